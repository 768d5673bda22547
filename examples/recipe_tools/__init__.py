"""What the recipes share: command lines, the report of the first log line, and models small enough to need no download.

A recipe is started by its path, so it puts the folder above its own on ``sys.path`` before it imports this.
"""
