"""Time and peak memory of the divergence loss, forward and backward: ours, naive full logits, TRL's chunked loss.

python benchmarks/loss.py                 both sizes, full and ragged, on the CPU with one thread
python benchmarks/loss.py --json out.json

Sizes are those of a head and its hidden states; the backbones are left out, so the numbers are the loss alone. Every
measurement is a process of its own: peak memory is the growth of the resident set over the inputs, time is the median
of the repetitions. "TRL" is the function its distillation trainer calls, on the same tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SIZES = {
    # name: (batch, completion length, student hidden, teacher hidden, vocabulary)
    "small: 1.3M <- 4.7M, V 2k": (8, 128, 128, 256, 2048),
    "medium: 59M <- 100M, V 32k": (8, 128, 512, 640, 32768),
}
RAGGED_LENGTHS = [128, 12, 96, 20, 64, 8, 72, 20]  # 41 % of 8·128


def inputs(size: str, ragged: bool, dtype: str = "float32"):
    import torch

    batch, length, hidden, teacher_hidden, vocab = SIZES[size]
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    student = torch.randn(batch, length, hidden, dtype=kind)
    teacher = torch.randn(batch, length, teacher_hidden, dtype=kind)
    student_head = torch.randn(vocab, hidden, dtype=kind) / hidden**0.5
    teacher_head = torch.randn(vocab, teacher_hidden, dtype=kind) / teacher_hidden**0.5
    lengths = torch.tensor(RAGGED_LENGTHS if ragged else [length] * batch)
    mask = torch.arange(length)[None] < lengths[:, None]
    return student.requires_grad_(), teacher, student_head.requires_grad_(), teacher_head, mask


def ours(student, teacher, student_head, teacher_head, mask, beta):
    from opd.objectives import divergence_loss, sum_over_tokens
    from opd.protocols import Dense, Head

    scores = Dense(teacher[mask], Head(teacher_head))
    summed = sum_over_tokens(Dense(student[mask], Head(student_head)), divergence_loss(scores, beta=beta))
    return summed.loss / mask.sum()


def naive(student, teacher, student_head, teacher_head, mask, beta):
    import torch

    s = (student @ student_head.t()).log_softmax(-1)
    t = (teacher @ teacher_head.t()).log_softmax(-1)
    if beta == 0:
        loss = (t.exp() * (t - s)).sum(-1)
    elif beta == 1:
        loss = (s.exp() * (s - t)).sum(-1)
    else:
        m = torch.logaddexp(t + torch.tensor(beta).log(), s + torch.tensor(1 - beta).log())
        loss = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    return (loss * mask).sum() / mask.sum()


def trl(student, teacher, student_head, teacher_head, mask, beta):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(
        student, teacher, student_head, teacher_head, mask.long(), beta, num_items_in_batch=mask.sum()
    )[0]


def measure(size: str, ragged: bool, beta: float, which: str, repeats: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    tensors = inputs(size, ragged)
    function = {"ours": ours, "naive": naive, "trl": trl}[which]
    if which == "trl":  # its import is not its memory
        from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: F401
    function(*[t[:1, :2] if t.dim() == 3 else t for t in tensors[:4]], tensors[4][:1, :2], beta).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, loss = [], None
    for _ in range(repeats):
        tensors[0].grad = tensors[2].grad = None
        start = time.process_time()
        loss = function(*tensors, beta)
        loss.backward()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(tensors[0].grad.norm()),
        "seconds": statistics.median(seconds),
        "megabytes": (peak - before) / 1024,
    }


def table(repeats: int, betas: list[float]) -> list[dict]:
    rows = []
    for size in SIZES:
        for ragged in (False, True):
            for beta in betas:
                results = {}
                for which in ("ours", "naive", "trl"):
                    command = [
                        sys.executable,
                        __file__,
                        "--one",
                        size,
                        str(int(ragged)),
                        str(beta),
                        which,
                        str(repeats),
                    ]
                    env = {**os.environ, "OMP_NUM_THREADS": "1"}
                    results[which] = json.loads(
                        subprocess.run(command, env=env, check=True, stdout=-1).stdout.splitlines()[-1]
                    )
                rows.append({"size": size, "ragged": ragged, "beta": beta, **results})
                print_row(rows[-1])
    return rows


def print_row(row: dict) -> None:
    ours_, naive_, trl_ = row["ours"], row["naive"], row["trl"]
    print(
        f"{row['size']:28} {'ragged' if row['ragged'] else 'full':6} β {row['beta']:<4}"
        f" ours {ours_['seconds'] * 1e3:8.1f} ms {ours_['megabytes']:7.0f} MB"
        f" | naive {naive_['seconds'] / ours_['seconds']:5.2f}x {naive_['megabytes']:7.0f} MB"
        f" | TRL {trl_['seconds'] / ours_['seconds']:5.2f}x {trl_['megabytes']:7.0f} MB"
        f" | loss ours-TRL {ours_['loss'] - trl_['loss']:+.1e}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.one:
        size, ragged, beta, which, repeats = arguments.one
        print(json.dumps(measure(size, bool(int(ragged)), float(beta), which, int(repeats))))
    else:
        result = table(arguments.repeats, arguments.betas)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(result, file, indent=1)
