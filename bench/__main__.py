"""`python -m bench`: the benchmarks, each with what it answers."""

from __future__ import annotations

from bench.catalog import benchmarks

if __name__ == "__main__":
    found = benchmarks()
    width = max(map(len, found))
    for name, about in found.items():
        print(f"python -m bench.{name:{width}}  {about}")
