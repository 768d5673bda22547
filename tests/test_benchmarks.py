"""The parts of the benchmarks that measure, write, call the C interface and draw. No test depends on a time."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY))

from boft_ext import _C  # noqa: E402
from benchmarks import c_interface, measure, op_cells, ops  # noqa: E402
from benchmarks.table import MACHINE_COLUMNS, Table  # noqa: E402
from benchmarks.workers import Workers  # noqa: E402

SHAPES = [(768, 8, 2), (60, 10, 2)]
TOKENS = 300


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_times_of_takes_the_median_and_the_percentiles():
    times = measure.times_of([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 10.0])
    assert times == (5.0, 2.0, 8.0, 11)
    assert measure.times_of([3.0]) == (3.0, 3.0, 3.0, 1)


def test_timing_columns_are_of_one_call():
    times, base = measure.Times(0.4, 0.2, 0.8, 7), measure.Times(0.1, 0.1, 0.1, 7)
    columns = measure.timing_columns(times, base, calls=100)
    expected = {"median_ms": 4.0, "p20_ms": 2.0, "p80_ms": 8.0, "rounds": 7, "ratio": 4.0}
    assert columns == pytest.approx(expected)
    assert measure.timing_columns(times)["ratio"] is None


def test_steps_run_in_turns_each_after_what_goes_before_it():
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in ("a", "b")}
    times = measure.in_turns(steps, budget_s=0, min_rounds=3, before={"b": lambda: ran.append("before b")})
    assert set(times) == {"a", "b"}
    assert {value.rounds for value in times.values()} == {3}
    # Every round holds both steps, in one order or the other, and what goes before b.
    pairs = [[name for name in ran if name != "before b"][i : i + 2] for i in range(0, 2 * ran.count("a"), 2)]
    assert len(pairs) >= 3
    assert all(sorted(pair) == ["a", "b"] for pair in pairs)
    assert all(ran[i - 1] == "before b" for i, name in enumerate(ran) if name == "b")


def test_a_table_holds_rows_with_their_machine(tmp_path):
    table = Table(tmp_path / "new" / "t.csv", ["case", "value", "other"])
    table.add(case="one", value=1 / 3)
    (row,) = read(table.path)
    assert list(row) == ["case", "value", "other", *MACHINE_COLUMNS]
    assert (row["case"], row["value"], row["other"]) == ("one", "0.333333", "")
    assert row["isa"] == _C.cpu_variant()
    assert row["threads"] == str(torch.get_num_threads())
    assert row["torch"] == torch.__version__


def test_a_table_refuses_columns_that_it_does_not_have(tmp_path):
    table = Table(tmp_path / "t.csv", ["case"])
    with pytest.raises(ValueError, match=r"t\.csv has no column nope"):
        table.add(case="one", nope=1)
    assert read(table.path) == []


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def workers(request):
    workers = Workers(request.param)
    yield workers
    workers.close()


def run(workers, *tasks):
    """Tasks one after another, each split over all workers."""
    for task in tasks:
        workers.run(c_interface.split(task, workers.count))


def assert_same(ours, operators):
    assert ours.dtype == operators.dtype
    assert torch.equal(ours.flatten(), operators.flatten())


@pytest.mark.parametrize("d, b, m", SHAPES)
def test_c_blocks_are_those_of_the_operators(d, b, m, workers):
    plan = c_interface.make_plan(d, b, m)
    boft_R = torch.randn(m, d // b, b, b)
    blocks, q = torch.ops.boft.blocks(boft_R, None)
    ours_q, ours = torch.full_like(q, torch.nan), torch.full_like(blocks, torch.nan)
    levels = range(plan.levels)
    run(workers, c_interface.cayley(boft_R, ours_q))
    run(workers, *(c_interface.collapse(plan, level, ours_q, ours) for level in levels))
    assert_same(ours_q, q)
    assert_same(ours, blocks)

    dblocks = torch.randn_like(blocks)
    dq, da = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    run(workers, *(c_interface.collapse_backward(plan, level, dblocks, q, dq) for level in levels))
    run(workers, c_interface.cayley_backward(dq, q, da))
    assert_same(da, torch.ops.boft.blocks_backward(dblocks, q, None))


@pytest.mark.parametrize("dtype", op_cells.DTYPES.values(), ids=op_cells.DTYPES)
@pytest.mark.parametrize("d, b, m", SHAPES)
def test_c_rotations_are_those_of_the_operators(d, b, m, dtype, workers):
    plan = c_interface.make_plan(d, b, m)
    assert [(level.first, level.factors) for level in c_interface.plan_levels(plan)] == _C.levels(d, b, m)
    blocks, _ = torch.ops.boft.blocks(torch.randn(m, d // b, b, b), None)
    x, dy = (torch.randn(TOKENS, d, dtype=dtype) for _ in range(2))
    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    run(workers, c_interface.rotate(plan, x, blocks, y))
    assert_same(y, torch.ops.boft.rotate(x, blocks, b, m, False))

    back, dblocks = torch.full_like(blocks, torch.nan), torch.full_like(blocks, torch.nan)
    parts = blocks.new_full((c_interface.rotate_backward_splits(plan, TOKENS), plan.count), torch.nan)
    run(workers, *(c_interface.transpose(plan, level, blocks, back) for level in range(plan.levels)))
    run(workers, c_interface.rotate_backward(plan, dy, x, blocks, back, dx, parts))
    run(workers, c_interface.sum_splits(parts, dblocks))
    operators_dx, operators_dblocks = torch.ops.boft.rotate_backward(dy, x, blocks, b, m, False, True, True)
    assert_same(dx, operators_dx)
    assert_same(dblocks, operators_dblocks)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 60)], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", op_cells.DTYPES.values(), ids=op_cells.DTYPES)
def test_c_scales_are_those_of_the_operators(dtype, bias, workers):
    z, dy = (torch.randn(TOKENS, 60, dtype=dtype) for _ in range(2))
    s = 1 + 0.1 * torch.randn(60)
    out, dz, ds = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan), torch.full_like(s, torch.nan)
    run(workers, c_interface.scale(z, s, bias, out))
    assert_same(out, torch.ops.boft.scale(z, s, bias, False))

    parts = s.new_full((c_interface.scale_backward_splits(TOKENS), 60), torch.nan)
    run(workers, c_interface.scale_backward(dy, z, s, bias, dz, parts), c_interface.sum_splits(parts, ds))
    operators_dz, operators_ds, _ = torch.ops.boft.scale_backward(dy, z, s, bias, False, True, True, False)
    assert_same(dz, operators_dz)
    assert_same(ds, operators_ds)


def test_c_refusals_are_errors_with_the_message_of_the_core():
    with pytest.raises(ValueError, match="30"):
        c_interface.make_plan(30, 4, 2)


@pytest.mark.parametrize("kind", op_cells.KINDS)
def test_a_device_without_c_entry_points_has_the_operators(kind):
    cell = op_cells.Cell(kind, 64, None if kind == "blocks" else 8, *([] if kind == "scale" else [8, 2]))
    with torch.no_grad():
        steps, workers = op_cells.entries(cell, op_cells.Place(torch.device("cpu")))
        for entry in steps.values():
            assert entry.sample.calibrate()
            entry.sample()
    assert workers is None
    assert set(steps) == {("clone", "clone"), *((case, "boft_ext") for case in op_cells.KINDS[kind].cases)}


def test_a_failed_call_in_a_worker_is_raised(workers):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        workers.run([fail])
    workers.run([int] * workers.count)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["nope"], "there is no level 'nope'"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["metamath"], "metamath on the CPU needs --tiny"),
    ],
)
def test_a_bad_command_line_ends_with_one_clear_line(arguments, reason):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture
def one_setting(monkeypatch):
    """The kernels and threads in use, alone, on three small shapes."""
    Cell = op_cells.Cell
    cells = [Cell("rotate", 64, 8, 8, 2), Cell("scale", 64, 8), Cell("blocks", 64, None, 8, 2)]
    setting = ops.Setting(_C.cpu_variant(), torch.get_num_threads(), cells)
    monkeypatch.setattr(ops, "settings", lambda quick: [setting])
    monkeypatch.setattr(ops, "fma_peak", lambda pool: 1e11)


def test_ops_measures_the_cases_that_only_names(tmp_path, one_setting):
    ops.run(tmp_path, True, "rotate d64 t8 b8 m2 f32")
    rows = read(tmp_path / "ops.csv")
    providers = {(row["case"], row["provider"]) for row in rows}
    assert providers == {("copy", "copy"), ("clone", "clone"), ("rotate", "boft_ext"), ("rotate", "boft_ext-c")}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["rounds"]) >= ops.MIN_ROUNDS
        assert float(row["floor_ms"]) > 0
        # One level of groups of 16 channels: 32 flops for each element of 8 bytes read and written.
        flops_per_byte = float(row["gflop_per_s"]) / float(row["gb_per_s"])
        assert flops_per_byte == pytest.approx(4 if row["case"] == "rotate" else 0, rel=1e-4)


def test_ops_without_a_case_of_that_name_writes_nothing(tmp_path, one_setting, capsys):
    ops.run(tmp_path, True, "rotate d65")
    assert capsys.readouterr().err == "ops: no case has 'rotate d65' in its name\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    return plots


def write_bars(path, slowest):
    """A step of two providers beside the base, and a merge that the base has no part in."""
    columns = ["level", "case", "provider", "dtype", "measure", "tokens", "median_ms", "p20_ms", "p80_ms", "ratio"]
    table = Table(path, columns)
    for dtype in ("f32", "bf16"):
        for provider, ratio in (("base", 1.0), ("lora", 1.3), ("boft_ext", slowest)):
            times = {"median_ms": 2 * ratio, "p20_ms": 1.9 * ratio, "p80_ms": 2.2 * ratio}
            named = {"level": "layer", "case": "linear", "provider": provider, "dtype": dtype}
            table.add(**named, measure="forward+backward", tokens=512, ratio=ratio, **times)
            if provider != "base":
                table.add(**named, measure="merge", **times)


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("slowest", [1.1, 40.0])
def test_plots_draw_the_tables_that_there_are(tmp_path, plots, one_setting, capsys, slowest):
    ops.run(tmp_path, True, None)
    capsys.readouterr()
    write_bars(tmp_path / "layers.csv", slowest)
    assert plots.main(["--results", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    names = ["ops-roofline.png", "layers-forward-backward.png", "layers-merge.png"]
    assert out.splitlines() == [str(tmp_path / name) for name in names]
    assert err.splitlines() == [f"models: not drawn: {tmp_path / 'models.csv'} does not exist"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)


def test_plots_without_a_table_fail(tmp_path, plots, capsys):
    (tmp_path / "ops.csv").write_text("case,provider\n")
    Table(tmp_path / "layers.csv", plots.BAR_COLUMNS)
    assert plots.main(["--results", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and list(tmp_path.glob("*.png")) == []
    ops_line, layers_line, models_line = err.splitlines()
    assert "ops.csv has no column dtype, d" in ops_line
    assert layers_line.endswith("layers.csv has no rows")
    assert models_line.endswith("models.csv does not exist")


def write_floors(path):
    """Three rotations and a backward as the C entry points take them, and rows that are not summed up."""
    table = Table(path, ["case", "provider", "dtype", "d", "tokens", "group", "levels", "workers", "floor_ratio"])
    common = {"provider": "boft_ext-c", "dtype": "f32", "d": 768, "tokens": 512, "group": 16, "levels": 1, "workers": 2}
    for ratio in (1.5, 1.0, 1.25):
        table.add(**common, case="rotate", floor_ratio=ratio)
    table.add(**{**common, "tokens": 8192}, case="rotate", floor_ratio=1.75)
    table.add(**{**common, "dtype": "bf16", "levels": 2}, case="rotate backward", floor_ratio=2.0)
    for other in ({"workers": 1}, {"isa": "elsewhere"}, {"provider": "boft_ext"}, {"tokens": 8}):
        table.add(**{**common, **other}, case="rotate", floor_ratio=99)
    table.add(**{**common, "group": None, "levels": None, "tokens": None}, case="blocks", floor_ratio=99)


def test_summary_of_floors_and_models(tmp_path, plots, capsys):
    from benchmarks import summary

    write_floors(tmp_path / "ops.csv")
    table = Table(tmp_path / "models.csv", ["case", "provider", "dtype", "measure", "ratio", "peak_ratio"])
    for provider, ratio in (("base", 1), ("boft_ext", 1.25)):
        table.add(case="llama", provider=provider, dtype="f32", measure="step", ratio=ratio, peak_ratio=2 * ratio)
        table.add(case="llama", provider=provider, dtype="bf16", measure="init")
    assert summary.main(["--results", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    floors, models = (part.splitlines()[2:] for part in out.strip().split("\n\n"))
    assert floors == [
        "| rotate backward, several levels | - | - | 2.00 (2.00–2.00) | - |",
        "| rotate, G = 16 | 1.25 (1.00–1.50) | 1.75 (1.75–1.75) | - | - |",
    ]
    rest = " | ".join(["- / -"] * 4)
    assert models == [
        f"| llama, step | - / - | - / - | - / - | 1.25 / - | {rest} |",
        f"| llama, peak | - / - | - / - | - / - | 2.50 / - | {rest} |",
    ]


def test_summary_without_a_table_fails(tmp_path, plots, capsys):
    from benchmarks import summary

    Table(tmp_path / "ops.csv", summary.OP_COLUMNS).add(
        case="rotate", provider="boft_ext", dtype="f32", tokens=512, workers=2
    )
    assert summary.main(["--results", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert "no rows of boft_ext-c with 512 tokens" in err and "models.csv does not exist" in err
