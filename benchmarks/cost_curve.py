"""The latency of a verify pass of several engines, interleaved in one run: medians and their ratios.

    python benchmarks/cost_curve.py build/smollm2-w8a8 build/smollm2-fp32 --rows 256

The last line is JSON: engine → cached length → width → milliseconds.
"""

import argparse
import json
from pathlib import Path

from engines import load_engine
from engines.latency import CURVE_WIDTHS, measure_interleaved
from engines.onnxruntime.threads import share_threads


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--rows", nargs="+", type=int, default=[256], help="cached positions")
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()

    share_threads()
    sessions = [load_engine(path).session for path in options.engines]
    surfaces = measure_interleaved(sessions, lengths=options.rows, repeats=options.repeats)
    for length in options.rows:
        print(f"{length} cached positions, milliseconds")
        print(f"{'':28}" + "".join(f"{f't({width})':>9}" for width in CURVE_WIDTHS) + f"{'t(8)/t(1)':>11}")
        for path, surface in zip(options.engines, surfaces, strict=True):
            curve = surface[length]
            cells = "".join(f"{curve[width]:9.2f}" for width in CURVE_WIDTHS)
            print(f"{path.name:28}{cells}{curve[8] / curve[1]:11.2f}")
        for path, surface in zip(options.engines[1:], surfaces[1:], strict=True):
            ratios = "".join(f"{surface[length][width] / surfaces[0][length][width]:9.2f}" for width in CURVE_WIDTHS)
            print(f"{f'{path.name} / {options.engines[0].name}':28}{ratios}")
    print(json.dumps({path.name: surface for path, surface in zip(options.engines, surfaces, strict=True)}))


if __name__ == "__main__":
    main()
