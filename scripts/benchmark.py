"""Ours against diffusers on the same weights and inputs: time, memory, FLOPs, operations.

python scripts/benchmark.py                          every workload at SD1.5 size; writes docs/performance.{md,json}
python scripts/benchmark.py unet_step_bf16 vae_decode_fp32 --pairs 5      these alone; the other rows stay
python scripts/benchmark.py --scale tiny --out /tmp/small                 seconds, to see that it works
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import console

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help="names (default: all, see --list)")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument(
        "--scale", default="full", choices=["full", "tiny"], help="size of the networks (default: full)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--pairs", type=int, default=3, help="timed calls of each side; 0 only counts")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for each side")
    parser.add_argument("--out", type=Path, default=None, help="folder to write (default: docs; nothing at tiny scale)")
    parser.add_argument("--peak-of", choices=["ours", "theirs"], help="print one side's peak memory, nothing else")
    args = parser.parse_args(argv)
    with console.user_errors():
        import torch

        from scripts.benchmarks import run

        if args.threads:
            torch.set_num_threads(args.threads)
        out = args.out or (DOCS if args.scale == "full" else None)
        threads = torch.get_num_threads()
        options = run.Options(args.scale, args.device, threads, args.pairs, not args.no_memory, out)
        names = args.workloads or list(run.WORKLOADS)
        if args.list:
            print(*names, sep="\n")
        elif args.peak_of:
            print(json.dumps(run.peak_here(names[0], args.peak_of, options)))
        else:
            command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
            for name in [name for name in names if run.workload(name)]:
                print(name, json.dumps(run.measured(name, options, command)), flush=True)


if __name__ == "__main__":
    main()
