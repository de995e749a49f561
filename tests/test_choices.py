# SPDX-License-Identifier: Apache-2.0
"""The values of arguments that have a few."""

import argparse

import pytest

from optimum_chatglm_ov.choices import ATTENTIONS, LINEARS, WAYS, canonical
from optimum_chatglm_ov.cli import bench, compare, export
from optimum_chatglm_ov.cli.arguments import add_runtime_options
from optimum_chatglm_ov.runtime.compilation import choice


def test_names_of_version_0_1_0_mean_what_they_meant():
    assert [canonical(name) for name in ("sdpa", "fused", "auto")] == list(ATTENTIONS)
    assert [canonical(name) for name in ("openvino", "fused", "fused-int8", "auto")] == list(LINEARS)
    assert [canonical(name) for name in ("sdpa", "fused", "fused-int8", "paged")] == list(WAYS)
    assert [canonical(name) for name in (*LINEARS, *WAYS)] == [*LINEARS, *WAYS]


def test_arguments_come_before_variables_before_defaults(monkeypatch):
    variable = "CHATGLM_OV_ATTENTION"
    monkeypatch.setenv(variable, "sdpa")
    assert choice("attention", None, ATTENTIONS, variable) == "openvino"
    assert choice("attention", "fused", ATTENTIONS, variable) == "native"
    monkeypatch.setenv(variable, "")
    assert choice("attention", None, ATTENTIONS, variable) == "auto"
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(ValueError, match=f"variable {variable} is 'fast'; expected 'openvino', 'native' or 'auto'"):
        choice("attention", None, ATTENTIONS, variable)
    with pytest.raises(ValueError, match="`attention` is 'slow'"):
        choice("attention", "slow", ATTENTIONS, variable)


@pytest.mark.parametrize(
    "add_arguments, arguments, expected",
    [
        (
            add_runtime_options,
            "--attention fused --linear fused-int8",
            {"attention": "native", "linear": "native-int8"},
        ),
        (add_runtime_options, "--attention openvino --linear auto", {"attention": "openvino", "linear": "auto"}),
        (bench.add_arguments, "--attention sdpa paged fused", {"attention": ["openvino", "paged", "native"]}),
        (export.add_options, "--attention fused", {"attention": "native"}),
        (export.add_options, "", {"attention": "openvino"}),
        (compare.add_arguments, "a b --text c --candidate-linear fused", {"candidate_linear": "native"}),
    ],
)
def test_the_command_line_takes_both(add_arguments, arguments, expected):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = vars(parser.parse_args(arguments.split()))
    assert {name: found[name] for name in expected} == expected
