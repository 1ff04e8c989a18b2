"""How P is formed from integer scores, and the bounds that this needs: steps 5 and 6 of docs/numerics.md.

A form works on scores (..., block_n), the scales `a` (..., KEY_GROUPS) of their key groups, the largest visible score
`top` (..., KEY_GROUPS) of each (-inf where none is), and the bounds (...) of their rows. Bounds are in units of
1 / `steps_per_octave` of log2 P.
"""

import numpy as np

from . import formats, quantize, special

SCORE_MAGIC = np.float32(12582912)  # the accumulator's start of `Ex2`; its ulp is 1


def score_start(head_dim):
    """The same of the linear forms, where it is read as a denormal: above the largest score of `head_dim` channels."""
    return np.float32(32 * 255 * 255 if head_dim <= 128 else 1 << 22)


STEEP = np.float32(0.25)  # the largest step of a score, in log2, of groups that are not steep


def _per_key(x, scores):
    return np.repeat(x, scores.shape[-1] // quantize.KEY_GROUPS, axis=-1)


def _from_top(arriving, b, scores, a, top, factor, bound, at_bound):
    """`arriving`, what the factor multiplies, and `b`, which is added: of steep groups, counted from the largest score.

    `b` is then log2 P of that score, not far from `at_bound`, whatever the factor.
    """
    steep = a > STEEP
    if not steep.any():
        return arriving, b
    top = np.where(np.isneginf(top), np.float32(0), top)  # no key is visible, and P does not count
    at_top = at_bound + (formats.mul_ru(top, factor) - bound[..., None])
    below = scores - _per_key(top, scores)
    return np.where(_per_key(steep, scores), below, arriving), np.where(steep, at_top, b)


class Ex2:
    """`ex2`, rounded to the type of P."""

    steps_per_octave = np.float32(1)
    bias = 0.0  #: log2 of the mean of P over 2**x

    def factor(self, a, plan):
        """What the integer score is multiplied by."""
        return a

    def round_bound(self, bound):
        return bound

    def p(self, scores, a, top, bound, plan, exact_parts=frozenset()):
        """P as float32 values of its type."""
        above = formats.add_rd(np.float32(plan.aim), -bound)[..., None]
        if "qk" in exact_parts:  # the scores are no integers: no magic number
            argument = formats.fma(scores, _per_key(a, scores), above)
        else:
            b = formats.add_rd(above, -formats.mul_ru(SCORE_MAGIC, a))
            arriving, b = _from_top(SCORE_MAGIC + scores, b, scores, a, top, a, bound, np.float32(plan.aim))
            argument = formats.fma(arriving, _per_key(a, scores), _per_key(b, scores))
        p = special.ex2(argument)
        if "p" in exact_parts:
            return p
        if plan.v_dtype == "f16":
            return formats.to_fp16(p).astype(np.float32)
        return formats.from_e4m3(formats.to_e4m3(p))


class Linear:
    """log2 P is an integer number of steps, which one FMA makes of a score; the integer becomes an E4M3 code.

    A subclass says how: `steps_per_octave`, `steps_at_one` (where P is 1), `max_steps` (larger ones count as it)
    and `codes`.
    """

    def _start_steps(self, a, plan):
        """Steps that `score_start` stands for, an integer."""
        return np.rint(a * (self.steps_per_octave * score_start(plan.head_dim)))

    def factor(self, a, plan):
        return self._start_steps(a, plan) * (np.float32(1) / score_start(plan.head_dim))

    def round_bound(self, bound):
        return np.ceil(bound)

    def steps(self, scores, a, top, bound, plan):
        """log2 P in steps. The FMA rounds once: float64 holds it exactly, and what is clipped may be off."""
        at_bound = np.float32(plan.aim * self.steps_per_octave + self.steps_at_one)
        factor = self.factor(a, plan)
        b = (at_bound - bound[..., None]) - self._start_steps(a, plan)
        arriving, b = _from_top(score_start(plan.head_dim) + scores, b, scores, a, top, factor, bound, at_bound)
        factor, b = (_per_key(x.astype(np.float64), scores) for x in (factor, np.rint(b)))
        steps = np.rint(factor * arriving + b)
        return np.where(np.isnan(steps), self.max_steps, np.clip(steps, 0, self.max_steps)).astype(np.int32)

    def p(self, scores, a, top, bound, plan, exact_parts=frozenset()):
        return formats.from_e4m3(self.codes(self.steps(scores, a, top, bound, plan)))


class Code(Linear):
    """The integer is the code: 3 mantissa bits, P = 2**i * (1 + f) instead of 2**(i + f)."""

    steps_per_octave = np.float32(8)
    steps_at_one = 8 * 7
    max_steps = formats.E4M3_NAN  # stands for all above the limit, where the bound moves
    bias = np.log2(0.5 / np.log(2) ** 2)  # the mean of (1 + f) * 2**-f

    def codes(self, steps):
        return steps.astype(np.uint8)


class Chord(Linear):
    """The integer, read as FP16, is 2**i * (1 + f), the chord of 2**x over an octave.

    The sum with the same half an octave on, weighted by 2**-0.5, is 2.06 times a chord over half an octave: at most
    1.6% above 2**x.
    """

    steps_per_octave = np.float32(1024)
    steps_at_one = 14 * 1024 - 51  # the sum is 1 there
    max_steps = formats.FP16_NAN
    half_octave = 512
    weight = np.float16(0.70703125)

    def codes(self, steps):
        chord, next_chord = (
            np.minimum(x, self.max_steps).astype(np.uint16).view(np.float16)
            for x in (steps, steps + self.half_octave)
        )
        return formats.to_e4m3(formats.fma16(next_chord, self.weight, chord).astype(np.float32))

    @property
    def bias(self):
        """log2 of the mean over an octave; each half of it is (c + s * f) * 2**-f."""
        w, ln2 = float(self.weight), np.log(2)

        def integral(c, s, f0, f1):
            at = lambda f: -(2.0**-f) * ((c + s * f) / ln2 + s / ln2**2)
            return at(f1) - at(f0)

        mean = integral(1 + 1.5 * w, 1 + w, 0, 0.5) + integral(1 + w, 1 + 2 * w, 0.5, 1)
        return np.log2(mean) + (self.steps_at_one - 15 * 1024) / 1024


FORMS = {"ex2": Ex2(), "code": Code(), "chord": Chord()}
