"""Write ``learning.svg``, the picture in howto/post_training.md, from real runs: ``python docs/learning.py FOLDER``.

Trains three seeds below FOLDER, 3 minutes of a core each. Runs that are finished there are not trained again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PICTURE = Path(__file__).parent / "learning.svg"
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77")  # of seeds 0, 1, 2
METRIC = "val/pass_at_1"
WIDTH, HEIGHT, LEFT, TOP = 420, 240, 56, 16  # of the area of the curves; room for what stands beside it
STEPS, EVERY = 150, 25

Points = list[tuple[int, float]]


def train(folder: Path, experiment: str, seed: int, *more: str) -> Points:
    """The steps of an experiment's evaluations, with the share of held-out problems that are solved."""
    name = f"seed{seed}"
    command = [sys.executable, "-m", "runner", f"experiment={experiment}", f"seed={seed}", f"run.name={name}", *more]
    subprocess.run(command, cwd=folder, check=True)
    files = sorted((folder / "outputs" / experiment / name / "metrics").glob("*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return sorted({line["step"]: line[METRIC] for line in lines if METRIC in line}.items())


def curve(folder: Path, seed: int) -> Points:
    """Step 0 is the end of fine-tuning."""
    _, before = train(folder, "arithmetic_sft", seed)[-1]
    return [(0, before), *train(folder, "arithmetic_grpo", seed, f"run.parent=outputs/arithmetic_sft/seed{seed}@best")]


def place(step: float, share: float) -> str:
    return f"{LEFT + WIDTH * step / STEPS:.1f},{TOP + HEIGHT * (1 - share):.1f}"


def text(step: float, share: float, words: str, more: str) -> str:
    x, y = place(step, share).split(",")
    return f'<text x="{x}" y="{y}" {more}>{words}</text>'


def picture(curves: Sequence[Points]) -> str:
    lines = [f'<path d="M{place(0, y / 5)}H{LEFT + WIDTH}" stroke="#ddd"/>' for y in range(6)]
    lines += [text(-2, y / 5 - 0.015, f"{y / 5:.1f}", 'text-anchor="end"') for y in range(6)]
    lines += [text(x, -0.07, str(x), 'text-anchor="middle"') for x in range(0, STEPS + 1, EVERY)]
    lines.append(text(STEPS / 2, -0.15, "steps of GRPO after fine-tuning", 'text-anchor="middle"'))
    lines.append(text(3, 0.94, "share of 500 held-out sums that are right", ""))
    for seed, (points, colour) in enumerate(zip(curves, COLOURS, strict=True)):
        way = " ".join(place(*point) for point in points)
        lines.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(text(STEPS * 0.8, 0.24 - 0.08 * seed, f"seed {seed}", f'fill="{colour}"'))
    size = f'viewBox="0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + 48}"'
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    return "\n".join([f"<svg {style} {size}>", '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"])


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    curves = [curve(folder, seed) for seed in range(len(COLOURS))]
    for seed, points in enumerate(curves):
        print(f"seed {seed}: {points[0][1]:.3f}, then {points[-1][1]:.3f}")
    PICTURE.write_text(picture(curves))


if __name__ == "__main__":
    main()
