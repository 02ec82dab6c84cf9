"""Pruning inside a training loop of your own: hwprune gives step hooks, the loop stays yours.

python examples/own_loop.py --budget 50% --epochs 5 --out runs/own_loop
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from hwprune.data import load_data
from hwprune.models import load_model
from hwprune.pipeline import Pruning
from hwprune.search import Search


def main(budget: str, epochs: int, out: str | None, profile_seconds: float | None = None) -> dict[str, object]:
    data = load_data("digits", batch_size=128)
    torch.manual_seed(0)
    model = load_model("resnet8", classes=data.classes, in_channels=data.shape[0])

    # Traces the model, measures what its widths cost here, and refuses a budget that no width meets.
    work = Pruning(
        model, torch.randn(64, *data.shape), budget=budget, out=out, name="resnet8", profile_seconds=profile_seconds
    )

    def train(network: nn.Module, lr: float, hooks: Search | None = None, teacher: nn.Module | None = None) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        network.train()
        step = 0
        for _ in range(epochs):
            for x, y in data.train:
                if hooks is not None:
                    hooks.before_step(step)  # masks of this step
                output = network(x)
                loss = F.cross_entropy(output, y)
                if teacher is not None:
                    with torch.no_grad():
                        soft = teacher(x).softmax(1)
                    loss = 0.5 * (loss + F.cross_entropy(output, soft))
                optimizer.zero_grad()
                loss.backward()
                if hooks is not None:
                    hooks.after_backward(step)  # the method reads the gradients
                optimizer.step()
                if hooks is not None:
                    hooks.after_step(step)
                step += 1

    train(work.model, lr=0.05)
    with work.search("dsa", steps=epochs * len(data.train)) as hooks:
        train(work.model, lr=0.05, hooks=hooks)
    smaller = work.cut()  # measured to be within the budget
    train(smaller, lr=0.05, teacher=work.dense.eval())
    smaller.eval()
    with torch.no_grad():
        hits = [(smaller(x).argmax(1) == y).float().mean() for x, y in data.test]
    return work.finish(smaller, accuracy=float(torch.stack(hits).mean()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="runs/own_loop")
    result = main(**vars(parser.parse_args()))
    print(f"{result['measured_ms']:.3g} of {result['budget_ms']:.3g} ms, accuracy {result['accuracy']:.2%}")
