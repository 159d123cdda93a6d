"""AUROC and specificity of runs on changed images: other exposure, framing, sharpness, more noise.

    make stress
    python tests/stress.py runs/unet --samples 534

Images from another day or place differ in these without being ill. It changes *validation* images
(of the phantom: drawn ones), so settings may be chosen by what it tells. Specificity is the share
of changed normal images under the threshold that 95 % of the unchanged ones stay under.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import run_command
from data import ABNORMAL, NORMAL, open_source, read_splits
from evaluate import (
    BASELINE, DEFAULT_SCORER, TrainedRun, TrivialScores, draw_evenly, group_by_seed, load_run,
    runs_in, weighted_metrics)
from models import SCORERS, box_filter, seeded, untrained_model


def change(images: Tensor, kind: str) -> Tensor:
    """uint8 images [n,1,H,W] as another device, place or hand would have made them: the same."""
    x, n, generator = images.float() / 255, len(images), seeded(0, kind, 0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    if kind == "exposure":  # gamma 0.7 to 1.4, contrast by up to 20 %, brightness by 0.1
        x = x ** torch.exp(uniform(math.log(0.7), math.log(1.4)))
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * uniform(0.8, 1.2) + mean + uniform(-0.1, 0.1)
    elif kind == "framing":  # turned by up to 10 degrees, shifted and scaled by up to 10 %
        angle, zoom = math.radians(10) * uniform(-1, 1), uniform(0.9, 1.1)
        rows = [torch.cat([angle.cos() * zoom, -angle.sin() * zoom, uniform(-0.2, 0.2)], -1),
                torch.cat([angle.sin() * zoom, angle.cos() * zoom, uniform(-0.2, 0.2)], -1)]
        grid = F.affine_grid(torch.cat(rows, 2)[:, 0], list(x.shape), align_corners=False)
        edge = 1 - 1 / x.shape[-1]
        x = F.grid_sample(x, grid.clamp(-edge, edge), align_corners=False)
    elif kind == "sharpness":  # from a 3x3 blur to the opposite
        x = x + uniform(-1, 1) * (box_filter(x, 3) - x)
    elif kind == "noise":  # standard deviation up to 0.05
        x = x + uniform(0, 0.05) * torch.randn(x.shape, generator=generator)
    return (255 * x.clamp(0, 1)).round().byte()


KINDS = ("unchanged", "exposure", "framing", "sharpness", "noise")


def scores_of(run: TrainedRun, samples: int) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """(labels [n], {score: {kind of change: scores [n]}}) of a run on its validation images."""
    source, splits = open_source(run.config), read_splits(run.folder / "split.csv")
    there = {s.key: s for s in source.samples}
    chosen = draw_evenly([there[s.key] for s in splits.val if s.key in there], samples)
    read = [(x, [chosen[i].label for i in at.tolist()]) for x, at in run.stream(source, chosen)]
    images, labels = torch.cat([x for x, _ in read]), np.concatenate([y for _, y in read])
    trivial = TrivialScores(run.some_normals(source, "train", 400).numpy())
    untrained = replace(run, model=untrained_model(run.config, run.setup).eval(),
                        scorer=run.untrained)
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind in KINDS:
        parts = []
        for x in change(images, kind).split(64):
            _, own, _ = run.score(x)
            _, other, _ = untrained.score(x)
            parts.append({k: own[k].numpy() for k in (*SCORERS, BASELINE)} | trivial(x.numpy())
                         | {"untrained": other[DEFAULT_SCORER].numpy()})
        for name in parts[0]:
            found.setdefault(name, {})[kind] = np.concatenate([p[name] for p in parts])
    return labels, found


def main() -> None:
    """Print a table for each group of runs that differ by their seed alone: means over them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=534, help="validation images (default: 534)")
    arguments = parser.parse_args()
    runs = [load_run(path) for given in arguments.runs for path in runs_in(given)]
    for group, members in group_by_seed(runs).items():
        print(f"\n{group}: AUROC, mean of the first four; specificity\n{'':26}"
              + "".join(f"{kind:>11}" for kind in KINDS) + "       mean  "
              + "".join(f"{kind[:8]:>9}" for kind in KINDS))
        tables = [scores_of(run, arguments.samples) for run in members]
        for name in tables[0][1]:
            aurocs, under = [], []
            for labels, found in tables:
                scores, normal = found[name], labels == NORMAL
                sign = 1.0
                if name not in (*SCORERS, BASELINE, "untrained"):  # trivial: the better direction
                    sign = np.sign(weighted_metrics(scores["unchanged"], labels)[0, 0] - 0.5)
                threshold = np.quantile(sign * scores["unchanged"][normal], 0.95, method="higher")
                aurocs.append([weighted_metrics(sign * scores[k], labels)[0, 0] for k in KINDS])
                under.append([(sign * scores[k][normal] <= threshold).mean() for k in KINDS])
            values, shares = np.mean(aurocs, axis=0), 100 * np.mean(under, axis=0)
            print(f"{name:26}" + "".join(f"{x:11.3f}" for x in values)
                  + f"{values[:4].mean():11.3f}  " + "".join(f"{x:7.0f} %" for x in shares))
        labels = tables[0][0]
        print(f"{(labels == NORMAL).sum()} normal and {(labels == ABNORMAL).sum()} abnormal; "
              f"runs: {len(members)}")


if __name__ == "__main__":
    sys.exit(run_command(main, "stress.py"))
