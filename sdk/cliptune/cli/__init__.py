"""The command line `cliptune`: one verb a module, gathered from entry points by `main`."""
