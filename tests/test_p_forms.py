"""The forms of P: what docs/numerics.md says of them, and the constants that the kernels repeat."""

import re

import numpy as np
import pytest

from sagepp import jit, launch
from sagepp.plan import make_plan
from sagepp.reference import formats, p_forms, special

FORMS = p_forms.FORMS
PLANS = {"code": make_plan("sm_90a", 128, "wgmma_fast"), "chord": make_plan("sm_90a", 128, "wgmma")}
LARGEST_SCORE = 128 * 127**2


SOURCE = (jit.source_dir() / "softmax.cuh").read_text()


def constant(name: str, form: str) -> float:
    """What kernels_src/softmax.cuh gives a constant, in a form of P."""
    value = re.search(rf"\b{name} = ([^;]+);", SOURCE)[1].replace("f", "")
    for choice in re.findall(r"P_FORM == (\w+) \? ([^:]+) :", value):
        if choice[0].lower() == form:
            return eval(choice[1], {"AIM": PLANS[form].aim})
    return eval(value.split(":")[-1], {"AIM": 4})


def p_of_steps(name, steps):
    return formats.from_e4m3(FORMS[name].codes(np.asarray(steps, np.int32)))


def test_numbers_of_the_forms():
    assert tuple(FORMS) == launch.P_FORMS
    for number, name in enumerate(launch.P_FORMS):
        assert f"#define {name.upper()} {number}\n" in SOURCE


def test_ex2_reaches_the_limit_where_the_kernels_say():
    """Around `LIMIT_LOG2` every float, farther away the error bound of ex2 decides."""
    limit = np.float32(constant("LIMIT_LOG2", "ex2"))
    x = (limit.view(np.int32) + np.arange(-(1 << 17), 1 << 17, dtype=np.int32)).view(np.float32)
    assert x[0] < np.log2(123.9) and x[-1] > np.log2(124.1)
    np.testing.assert_array_equal(formats.to_e4m3(special.ex2(x)) >= 112, x >= limit)


@pytest.mark.parametrize("name", PLANS)
def test_linear_forms_grow_and_reach_the_limit_where_the_kernels_say(name):
    codes = FORMS[name].codes(np.arange(FORMS[name].max_steps + 1, dtype=np.int32)).astype(int)
    assert codes[0] == 0 and (np.diff(codes) >= 0).all()
    assert np.argmax(codes >= 112) == constant("STEPS_AT_LIMIT", name)


@pytest.mark.parametrize("name", PLANS)
def test_scales_of_the_linear_forms_are_the_kernels(name):
    form, aim = FORMS[name], PLANS[name].aim
    assert constant("STEPS_PER_OCTAVE", name) == form.steps_per_octave
    assert constant("STEPS_AT_BOUND", name) == aim * form.steps_per_octave + form.steps_at_one
    assert constant("BIAS", name) == pytest.approx(form.bias, abs=1e-12)


@pytest.mark.parametrize("name, error", [("code", 0.0615), ("chord", 0.0160)])
def test_linear_forms_follow_the_exponential(name, error):
    """Over an octave, before rounding: the ratio to 2**x within `error` of its smallest; its mean is `bias`."""
    form = FORMS[name]
    f = (np.arange(1 << 16) + 0.5) / (1 << 16)
    if name == "code":
        approximate = 1 + f
    else:
        chord = lambda x: np.exp2(np.floor(x)) * (1 + x - np.floor(x))
        weight = float(form.weight)
        approximate = (chord(f) + weight * chord(f + 0.5)) * 2.0 ** ((form.steps_at_one - 15 * 1024) / 1024)
    ratio = approximate / np.exp2(f)
    assert ratio.max() / ratio.min() - 1 < error
    assert np.log2(ratio.mean()) == pytest.approx(form.bias, abs=1e-8)


def test_chord_rounds_what_it_says():
    """From 2**-6, the smallest normal E4M3 number, to the limit, P is the chord's value rounded to E4M3."""
    form = FORMS["chord"]
    steps = np.arange(9 * 1024, constant("STEPS_AT_LIMIT", "chord"))
    log2_p = (steps - form.steps_at_one) / 1024
    p = p_of_steps("chord", steps)
    assert np.abs(p / np.exp2(log2_p) - 1).max() < (1 + 1 / 16) * 1.0165 - 1
    assert p_of_steps("chord", [form.steps_at_one + 1024 * k for k in (-3, 0, 4)]).tolist() == [0.125, 1, 16]


@pytest.mark.parametrize("name", PLANS)
def test_p_is_at_the_bound_what_the_plan_aims_at(name):
    """For the largest score under its own bound, whatever the scale: at most 2**(aim + 1), mostly 2**aim."""
    rng = np.random.default_rng(0)
    form, plan = FORMS[name], PLANS[name]
    a = np.exp2(rng.uniform(-40, -2, (4000, 1))).astype(np.float32).repeat(4, axis=1)
    scores = rng.integers(-LARGEST_SCORE, LARGEST_SCORE, (4000, 4)).astype(np.float32)
    top = scores.max(axis=1)
    bound = form.round_bound(formats.mul_ru(top, form.factor(a, plan)[:, 0]))
    steps = form.steps(scores, a, scores, bound, plan)
    at_bound = plan.aim * form.steps_per_octave + form.steps_at_one
    assert (steps.max(axis=1) <= at_bound + form.steps_per_octave / 5).all()
    usual = a[:, 0] < 2.0**-8
    assert (np.abs(steps.max(axis=1)[usual] - at_bound) <= 2).all()
    # within a row, steps are differences of the scores in units of 1 / steps_per_octave
    expected = at_bound + (scores - top[:, None]).astype(np.float64) * a * form.steps_per_octave
    inside = (expected > 0) & usual[:, None]
    tolerance = 3 + np.abs(scores - top[:, None]) / float(p_forms.score_start(128))
    assert (np.abs(steps - expected) <= tolerance)[inside].all()


@pytest.mark.parametrize("name", FORMS)
def test_p_of_steep_groups(name):
    """Under the bound of the largest score P is at most 2**aim, nearly that of the largest score, 0 of most others."""
    rng = np.random.default_rng(0)
    form, plan = FORMS[name], PLANS.get(name, make_plan("sm_89", 128, "mma"))
    a = np.exp2(rng.uniform(-2, 90, (4000, 1))).astype(np.float32).repeat(4, axis=1)
    a = a[(a > p_forms.STEEP).all(axis=1)]
    scores = rng.integers(-LARGEST_SCORE, LARGEST_SCORE, (len(a), 4, 8)).astype(np.float32)
    scores[:, :, 1] = scores[:, :, 0] - 1
    top, scores = scores.max(axis=2), scores.reshape(len(a), -1)
    bound = form.round_bound(formats.mul_ru(top, form.factor(a, plan)).max(axis=1))
    p = form.p(scores, a, top, bound, plan)
    is_top = scores == scores.max(axis=1, keepdims=True)
    at_top = 2.0**plan.aim
    assert p.max() <= at_top and (p[is_top] > at_top / 2).all()
    distance = (scores.max(axis=1, keepdims=True) - scores).astype(np.float64) * a[:, :1]
    assert not p[distance > 20].any()
    near = (distance < 6) & (distance > 0)
    assert near.any() and (np.abs(np.log2(p[near] / at_top) + distance[near]) < 0.25).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_arrive_positive(head_dim):
    start, largest = p_forms.score_start(head_dim), head_dim * 127**2
    assert largest < start and start + largest < 2**23  # a denormal


def test_nan_and_absent_bounds():
    for name, plan in PLANS.items():
        scores = np.zeros((1, 4), np.float32)
        a = np.full((1, 4), np.float32(1e-4))
        assert np.isnan(FORMS[name].p(scores, a * np.nan, scores, np.zeros(1, np.float32), plan)).all()
        at_no_bound = FORMS[name].p(scores, a, scores, np.full(1, -np.inf, np.float32), plan)  # such keys are masked
        assert (np.isnan(at_no_bound) | (at_no_bound >= 128)).all()
