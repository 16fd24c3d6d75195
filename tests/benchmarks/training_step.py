"""The training part of a rollout step (scoring, forward, backward): this package against stock TRL.

    python tests/benchmarks/training_step.py --preset cpu        # `small_step`: two cores are enough, about seven minutes
    accelerate launch --config_file accelerate_configs/zero3_1gpu.yaml \\
        tests/benchmarks/training_step.py --preset 1.5b          # `large_step`: on a GPU, Qwen2-1.5B's shape, 16k, bf16

The last line of the output is one JSON object.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=["cpu", "1.5b", "1.5b-rehearsal"], default="1.5b" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repetitions", type=int, help="counted runs of each side, in alternation; default 3 (1.5b: 2)")
    parser.add_argument("--budget", type=int, help="tokens per micro-batch of ours, instead of the preset's")
    large = parser.add_argument_group("presets 1.5b and 1.5b-rehearsal")
    large.add_argument("--quick", action="store_true", help="one repetition of four variants, half the responses")
    large.add_argument("--json", type=Path, help="write all figures there too, anew after every measurement")
    large.add_argument("--peak_tflops", type=float, default=989.0, help="of the device in bf16; 989: H100 and H200, dense")
    args = parser.parse_args()
    if args.preset == "cpu":
        from tests.benchmarks import small_step

        small_step.main(args.repetitions or 3, args.budget)
        return 0
    from tests.benchmarks import large_step

    return large_step.main(
        args.preset,
        quick=args.quick,
        repetitions=args.repetitions or 2,
        budget=args.budget,
        peak_tflops=args.peak_tflops,
        out=args.json,
    )


if __name__ == "__main__":
    sys.exit(main())
