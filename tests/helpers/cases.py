"""What the tests of benchmarks share: small problems, broken backends, a report as text."""

import io

import torch
from rich.console import Console

from deltaproduct.benchmarks import OpShape
from deltaproduct.benchmarks.render import render
from deltaproduct.experiments.word_problems import s3
from deltaproduct.ops.reference import reference

CPU = torch.device("cpu")
TINY = OpShape(2, 8, 1, 4, 2)
S3 = s3("cpu", [0])[0].config


def shown(report) -> str:
    written = io.StringIO()
    render(report, Console(file=written, width=80))
    return written.getvalue()


def rows_of(report, shape=0):
    return {row.backend: row for row in report.shapes[shape].rows}


def off_in_the_output(*args):
    o, state = reference(*args)
    return o * 1.01, state


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def off_in_one_gradient(q, k, v, beta, *rest):
    return reference(q, k, v, _Doubled.apply(beta), *rest)


def not_a_number(*args):
    o, state = reference(*args)
    return o / 0 * 0, state
