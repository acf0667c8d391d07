"""The grammar of gates, and what meets them."""

import math

import pytest

from awq_core.errors import ConfigError
from awq_core.evaluation import Gate, GateError
from awq_core.evaluation.gates import check, check_names, require


@pytest.mark.parametrize(
    ("text", "metric", "sign", "bound"),
    [
        ("ppl_increase<1%", "ppl_increase", "<", 0.01),
        (" kl <= 0.02 ", "kl", "<=", 0.02),
        ("top1>=99.5%", "top1", ">=", 0.995),
        ("ppl<1e1", "ppl", "<", 10.0),
        ("ppl_increase>-.5", "ppl_increase", ">", -0.5),
        ("gsm8k.exact_match.strict-match>0.4", "gsm8k.exact_match.strict-match", ">", 0.4),
    ],
)
def test_grammar(text, metric, sign, bound):
    gate = Gate.parse(text)
    assert (gate.metric, gate.operator, gate.text) == (metric, sign, text.strip())
    assert gate.bound == pytest.approx(bound, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        *("", "kl", "kl<", "<1", "kl=1", "kl==1", "kl<1%%", "kl<x", "kl<nan", "kl<inf", "1<kl", "kl<1<2", "kl<(1)"),
        *("a b<1", "__import__('os').system('x')<1", "kl<1;ppl<2", "kl<1e", "kl<0x1", "kl<\u0663"),
    ],
)
def test_nothing_else_is_a_gate(text):
    with pytest.raises(ConfigError, match="is no gate"):
        Gate.parse(text)


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        *(("x<1", 0.9, True), ("x<1", 1.0, False), ("x<=1", 1.0, True), ("x>1", 1.0, False), ("x>=1", 1.0, True)),
        *((f"x{sign}1", math.nan, False) for sign in ("<", "<=", ">", ">=")),
        *(("x<5", math.inf, False), ("x<1%", 0.0099, True), ("x<1%", 0.01, False)),
    ],
)
def test_what_meets_a_gate(text, value, met):
    (result,) = check([Gate.parse(text)], {"x": value})
    assert result.met is met
    if met:
        require([result])
    else:
        with pytest.raises(GateError, match=r"x.*is not met: x = ") as caught:
            require([result])
        assert caught.value.exit_code == 5


def test_unknown_metrics():
    with pytest.raises(ConfigError) as caught:
        check_names([Gate.parse("pll<5")], ["ppl", "kl"], ["arc"])
    assert "'pll'" in caught.value.message
    assert "did you mean ppl?" in caught.value.hint and "known here: kl, ppl, arc..." in caught.value.hint
    check_names([Gate.parse("arc.acc>0"), Gate.parse("arc_easy.acc>0")], [], ["arc"])
    with pytest.raises(ConfigError, match=r"no metric 'arc\.acc'"):
        check([Gate.parse("arc.acc>0")], {"arc.acc_norm": 1.0})
