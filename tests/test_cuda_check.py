"""Each rule of `make cuda-check` can fail: on recorded lines of ptxas and cuobjdump, and small changes to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cuda"
sys.path.append(str(FOLDER))

import check_cuda  # noqa: E402
import sass  # noqa: E402
from plan import Family  # noqa: E402

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPfi' for 'sm_90'
ptxas info    : Function properties for _Z5firstPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compile time = 9.381 ms
ptxas info    : Compiling entry function '_Z6secondPfi' for 'sm_90'
ptxas info    : Function properties for _Z6secondPfi
    256 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 10.691 ms
"""

# A loop over two tiles of which the next is loaded while the products of this one run.
PREFETCHED = """\
\t\tFunction : _Z5firstPfi
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                               /* 0x00000a00ff017b82 */
                                                                                        /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x90 ;                                           /* 0x0000000000308947 */
        /*0020*/                   LDG.E.128.CONSTANT R12, desc[UR6][R2.64] ;           /* 0x00000006020c7981 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R20, R4 ;                /* 0x000000140804723c */
        /*0040*/                   HMMA.16816.F32.BF16 R24, R8, R22, R24 ;              /* 0x000000140804723c */
        /*0050*/                   IMAD.MOV.U32 R8, RZ, RZ, R12 ;                       /* 0x000000ffff087224 */
        /*0060*/                   MOV R11, R15 ;                                       /* 0x000000ffff0b7224 */
        /*0070*/              @!P0 BRA 0x20 ;                                           /* 0xfffffffc00c08947 */
        /*0080*/                   STG.E.128 desc[UR6][R2.64], R4 ;                     /* 0x0000000402007986 */
        /*0090*/                   EXIT ;                                               /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                            /* 0xfffffffc00fc7947 */
"""
LOAD = "        /*0020*/                   LDG.E.128.CONSTANT R12, desc[UR6][R2.64] ;"
SUNK = PREFETCHED.replace(LOAD, LOAD.replace("0020", "0048")).replace("BRA 0x20", "BRA 0x30")
# Without the copy the load is of registers that the first product reads in the next round.
ROTATED = PREFETCHED.replace("R12, desc", "R8, desc").replace("/*0020*/", "/*0065*/").replace("BRA 0x20", "BRA 0x30")

FAMILY = Family("first", registers=28, shared=2048, why="", wide=True, hmma=True, prefetch=True)
GOOD = sass.Resources(registers=28, shared=2048, stack=0, spills=0)


def in_order(text):
    """The lines of a listing in the order of their addresses."""
    lines = text.splitlines()
    return "\n".join([*lines[:2], *sorted(line for line in lines[2:] if line.lstrip().startswith("/*0"))])


def found(listing=PREFETCHED, resources=GOOD, family=FAMILY):
    (body,) = sass.parse_sass(in_order(listing)).values()
    return list(check_cuda.problems(check_cuda.Kernel("_Z5firstPfi", "sm_90", resources, body), family))


def test_resources_of_every_kernel():
    assert sass.parse_ptxas(PTXAS) == {
        "_Z5firstPfi": sass.Resources(28, 2048, 0, 0),
        "_Z6secondPfi": sass.Resources(255, 0, 256, 20),
    }


def test_instructions_of_a_kernel():
    (body,) = sass.parse_sass(PREFETCHED).values()
    assert len(body) == 11
    assert body[2] == sass.Instruction(0x20, "LDG.E.128.CONSTANT", ("R12", "desc[UR6][R2.64]"))
    assert body[1] == sass.Instruction(0x10, "BRA", ("0x90",))
    (loop,) = sass.loops(body)
    assert [item.address for item in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70]


def test_the_hot_loop_is_the_shortest_that_loads_and_multiplies():
    (body,) = sass.parse_sass(PREFETCHED.replace("EXIT ;", "BRA 0x10 ;")).values()
    inner, outer = sass.loops(body)
    assert len(inner) < len(outer) and sass.hot_loop(body) == inner
    # A loop of products alone, for a rare case, within the loop that loads.
    (body,) = sass.parse_sass(PREFETCHED.replace("MOV R11, R15", "@P1 BRA 0x30")).values()
    inner, outer = sass.loops(body)
    assert len(inner) < len(outer) and sass.hot_loop(body) == outer


def test_a_good_kernel_passes():
    assert found() == []


@pytest.mark.parametrize(
    "resources, said",
    [
        (GOOD._replace(registers=29), "29 registers, planned 28"),
        (GOOD._replace(shared=2049), "2049 bytes of static shared memory, planned 2048"),
        (GOOD._replace(stack=8), "8 bytes of stack, 0 bytes of spills"),
        (GOOD._replace(spills=4), "0 bytes of stack, 4 bytes of spills"),
    ],
)
def test_resources_above_the_plan_fail(resources, said):
    assert found(resources=resources) == [said]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("LDC R1", "LDL R1", ["local memory: LDL"]),
        ("LDC R1", "STL.64 R1", ["local memory: STL.64"]),
        ("LDG.E.128.CONSTANT", "LDG.E.64", ["no LDG.E.128", "no loop with both LDG.E.128 and HMMA"]),
        ("STG.E.128", "STG.E", ["no STG.E.128"]),
        ("HMMA.16816", "FFMA", ["no HMMA", "no loop with both LDG.E.128 and HMMA"]),
        ("MOV R11, R15", "CALL.REL.NOINC 0x10", ["the hot loop calls a routine"]),
        ("MOV R11, R15", "CALL.REL.NOINC 0x80", []),
        ("BRA 0x20", "BRA 0x80", ["no loop with both LDG.E.128 and HMMA"]),
    ],
)
def test_instructions_that_are_missing_or_forbidden_fail(old, new, said):
    assert old in PREFETCHED
    assert found(PREFETCHED.replace(old, new)) == said


def test_asynchronous_copies_to_shared_memory_count_as_wide_loads():
    family = FAMILY._replace(prefetch=False)
    listing = PREFETCHED.replace("LDG.E.128.CONSTANT R12", "LDGSTS.E.BYPASS.128 [R12]")
    assert found(listing, family=family) == []


def test_loads_that_sank_below_the_products_fail():
    assert found(SUNK) == ["loads sunk below the products: 0 of 2 HMMA between a load and its first use"]


def test_a_load_is_followed_into_the_next_round():
    assert found(ROTATED) == ["loads sunk below the products: 0 of 2 HMMA between a load and its first use"]
    # The first product no longer reads it: one of two lies between.
    assert found(ROTATED.replace("R4, R8, R20", "R4, R16, R20")) == []


def test_kernels_and_plan_must_match(monkeypatch):
    monkeypatch.setattr(check_cuda.plan, "FAMILIES", (FAMILY, FAMILY._replace(pattern="third")))
    (body,) = sass.parse_sass(PREFETCHED).values()
    kernels = [check_cuda.Kernel(name, "sm_90", GOOD, body) for name in ("_Z5firstPfi", "_Z6secondPfi")]
    failures, rows = check_cuda.check(kernels, check_cuda.demangled(["_Z5firstPfi", "_Z6secondPfi"]))
    assert failures == [
        "second sm_90: not in the plan (tests/cuda/plan.py)",
        "third: in the plan, but there is no such kernel",
    ]
    assert [row[0] for row in rows] == ["first"]


@pytest.mark.parametrize(
    "declaration, name",
    [
        ("void rotate_tile<(int)4, true>(Args, long)", "rotate_tile<4,true>"),
        ("void multiply<float, (product_kind)3>(data<float>)", "multiply<float,3>"),
        ("void rotate<Pair<float, 2>, 8>(boft_rotate_args)", "rotate<Pair<float,2>,8>"),
        ("void (anonymous namespace)::rotate<Bf16, 8>(float*, (anonymous namespace)::Args)", "rotate<Bf16,8>"),
        ("plain", "plain"),
    ],
)
def test_names_as_the_plan_has_them(declaration, name):
    assert check_cuda.short_name(declaration) == name


def run(path, *arguments, **environment):
    command = [sys.executable, str(FOLDER / "check_cuda.py")]
    return subprocess.run(
        [*command, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, cwd=path
    )


def toolkit(path):
    """A folder for CUDA_HOME whose compiler refuses everything."""
    nvcc = path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no such luck >&2; exit 1\n")
    nvcc.chmod(0o755)
    return str(path)


def test_without_nvcc_one_line_says_so(tmp_path):
    done = run(tmp_path, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith("cuda-check: skipped: no nvcc found")


def test_without_cuobjdump_the_check_fails(tmp_path):
    done = run(tmp_path, CUDA_HOME=toolkit(tmp_path), CUOBJDUMP="no-such-cuobjdump")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "cuda-check: nvcc is there, but no cuobjdump: pip install nvidia-cuda-cuobjdump"
    ]


def test_what_the_compiler_says_is_shown(tmp_path):
    (tmp_path / "a.cu").touch()
    done = run(tmp_path, "--arch", "sm_90", "a.cu", CUDA_HOME=toolkit(tmp_path), CUOBJDUMP=sys.executable)
    assert done.returncode == 1 and "no such luck" in done.stderr and "Traceback" not in done.stderr
