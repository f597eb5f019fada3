"""The recipe language: parsing, resolving, printing, and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.methods.presets import PRESETS
from normtune.methods.recipe import Recipe, parse, resolve
from normtune.methods.registry import ADDED, INTRINSIC, METHODS, TEXT_ONLY, Method, RecipeError, Value
from normtune.models.part_names import PARTS

MISS = ("vision", "encoder", "decoder")
LLAVA = ("vision", "connector", "language")
LN, FULL = (Method("ln"),), (Method("full"),)
LORA4 = Method("lora", (("r", 4), ("alpha", 32), ("dropout", 0.1)))


def methods(model: tuple[str, ...], text: str) -> dict[str, tuple[Method, ...]]:
    return dict(resolve(parse(text), model).parts)


def test_parses_every_form() -> None:
    assert parse("ln") == Recipe((("all", LN),))
    assert parse("ln+bias").methods_of("all") == (Method("ln"), Method("bias"))
    assert parse("lora(r=4, alpha=32,dropout=0.1)").methods_of("all") == (LORA4,)
    assert parse("lora(r=4)[0:8]").methods_of("all") == (Method("lora", (("r", 4),), (0, 8)),)
    targets = Method("lora", (("targets", "q_proj+mlp.down_proj"),))
    assert parse("lora( targets = q_proj + mlp.down_proj )+ln").methods_of("all") == (targets, Method("ln"))
    assert str(targets) == "lora(targets=q_proj+mlp.down_proj)"
    recipe = parse(" vision = frozen , encoder+decoder = ln[16:] + bias[-2:] ")
    late = (Method("ln", layers=(16, None)), Method("bias", layers=(-2, None)))
    assert recipe.parts == (("vision", ()), ("encoder", late), ("decoder", late))
    assert parse("connector?=full,language=ln").optional == {"connector"}


def test_options_have_defaults_and_an_explicit_default_changes_nothing() -> None:
    assert Method("lora").option("r") == 8
    assert Method("lora").option("alpha") == 16
    assert Method("prefix").option("n") == 10
    assert Method("adapter").option("width") == 64
    assert LORA4.option("dropout") == 0.1
    assert parse("lora(dropout=0.0,r=8)") == parse("lora")
    assert parse("ln[:]") == parse("ln") == parse("ln(gain=1,bias=1)")
    assert str(parse("ln-gain-only")) == "all=ln(bias=0)"


def test_layer_ranges_are_slices() -> None:
    assert Method("ln", layers=(16, None)).layer_range(32) == range(16, 32)
    assert Method("ln", layers=(-8, None)).layer_range(32) == range(24, 32)
    assert Method("ln", layers=(0, 8)).layer_range(4) == range(4)
    assert Method("ln").layer_range(3) == range(3)


def test_resolves_over_a_models_parts() -> None:
    assert methods(MISS, "ln") == {"vision": LN, "encoder": LN, "decoder": LN}
    assert methods(MISS, "language=ln") == {"vision": (), "encoder": LN, "decoder": LN}
    assert methods(LLAVA, "decoder=ln") == {"vision": (), "connector": (), "language": LN}
    assert methods(LLAVA, "vision=full,all=ln") == {"vision": FULL, "connector": LN, "language": LN}
    assert methods(MISS, "encoder=full,language=ln") == {"vision": (), "encoder": FULL, "decoder": LN}
    assert methods(MISS, "connector?=full,language=ln") == {"vision": (), "encoder": LN, "decoder": LN}
    assert methods(LLAVA, "frozen") == {"vision": (), "connector": (), "language": ()}


def test_all_is_optional_and_a_named_part_is_not() -> None:
    assert resolve(parse("ln"), LLAVA).optional == {"vision", "connector", "language"}
    assert resolve(parse("all=ln,vision=ln"), LLAVA).optional == {"connector", "language"}
    assert resolve(parse("all=ln,vision=frozen"), LLAVA).optional == {"connector", "language"}
    assert resolve(parse("language=ln"), MISS).optional == frozenset()


def test_prefix_tokens_go_to_text_parts_unless_named() -> None:
    prefix = (Method("prefix"),)
    assert methods(LLAVA, "prefix") == {"vision": (), "connector": (), "language": prefix}
    assert methods(MISS, "prefix") == {"vision": (), "encoder": prefix, "decoder": prefix}
    assert methods(MISS, "vision=prefix")["vision"] == prefix


def test_resolving_twice_changes_nothing() -> None:
    for text in PRESETS.values():
        once = resolve(parse(text), MISS)
        assert resolve(once, MISS) == once == parse(str(once))


def test_presets() -> None:
    named = {"frozen", "full", "ln", "ln-vision", "ln-language", "ln-encoder", "ln-decoder", "ln-encoder+decoder"}
    assert named | {"attention", "ffn", "bias", "lora-4", "lora-8", "prefix", "ptuning", "ia3", "adapter"} <= set(
        PRESETS
    )
    assert methods(MISS, "frozen-lora4-lora4") == {"vision": (), "encoder": (LORA4,), "decoder": (LORA4,)}
    assert methods(MISS, "full-full-prefix") == {"vision": FULL, "encoder": FULL, "decoder": (Method("prefix"),)}
    assert methods(LLAVA, "frozen-full-ln") == {"vision": (), "connector": (), "language": LN}
    assert methods(MISS, "ln-encoder+decoder") == methods(MISS, "ln-language")
    for name, text in PRESETS.items():
        assert parse(name) == parse(text) == parse(str(parse(name)))
        resolve(parse(name), MISS)
    assert "lora" not in PRESETS, "bare lora has the defaults of METHODS, not those of lora-4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vision=fnn", "unknown method 'fnn', did you mean 'ffn'? (column 8 of recipe 'vision=fnn')"),
        ("vision=norm", "unknown method 'norm' (methods: frozen, full, ln, "),
        ("visoin=ln", "unknown part 'visoin', did you mean 'vision'?"),
        ("ln-visoin", "unknown method 'ln-visoin', did you mean 'ln-vision'?"),
        ("language", "it is a part, write language=METHOD"),
        ("vision=", "expected a method, got the end (column 8"),
        ("vision=ln,", "expected a part, got the end (column 11"),
        ("vision=ln decoder=ln", "unexpected 'd' (column 11"),
        ("vision=ln,vision=full", "part 'vision' is given twice (column 11"),
        ("vision+vision=ln", "part 'vision' is given twice"),
        ("lora(rank=4)", "'lora' has no option 'rank'"),
        ("lora(r=4,r=4)", "option 'r' is given twice (column 10"),
        ("lora(r=0)", "r of 'lora' is 0; it must be a whole number, 1 or more (column 6"),
        ("lora(r=1.5)", "r of 'lora' is 1.5"),
        ("lora(dropout=1)", "must be at least 0 and below 1"),
        ("lora(r=four)", "'four' is not a number (column 8"),
        ("lora(targets=4)", "target '4' is not the name of a linear, such as q_proj, or all-linear (column 6"),
        ("lora(targets=q_proj+q_proj)", "target 'q_proj' is given twice (column 14"),
        ("lora(targets=all-linear+q_proj)", "covers the other targets"),
        ("lora(targets=)", "expected a value, got ')'"),
        ("lora(r=4+5)", "'4+5' is not a number (column 8"),
        ("lora(r=4", "expected ')' at the end of the options, got the end"),
        ("ln(r=4)", "'ln' has no option 'r' (options: gain, bias)"),
        ("ln(gain=2)", "gain of 'ln' is 2; it must be 0 or 1 (column 4"),
        ("ln(gain=0,bias=0)", "trains neither gains nor biases"),
        ("ln[8:4]", "layer range [8:4] is empty"),
        ("ln[:0]", "layer range [:0] is empty"),
        ("ln[8]", "written [16:], [:8] or [4:8]"),
        ("frozen+ln", "'frozen' can't be joined"),
        ("ln+frozen", "a frozen part has no methods"),
        ("ln+ln", "'ln' is given twice to one part"),
        ("lora(r=4)+lora(r=8)", "'lora' can be given once"),
        ("prefix+ptuning", "both add prefix tokens"),
        ("", "the recipe is empty"),
        ("lora(r=" + "9" * 5000 + ")", "is not a number"),
    ],
)
def test_parse_errors_explain_themselves(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("connector=ln", MISS, "no part 'connector'; its parts: vision, encoder, decoder"),
        ("encoder=ln", LLAVA, "no part 'encoder'; its parts: vision, connector, language"),
        ("language=ln,decoder=full", LLAVA, "'language' and 'decoder' are one part"),
        ("connector?=full", MISS, "trains nothing on this model"),
    ],
)
def test_resolve_errors_explain_themselves(text: str, model: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match="part") as caught:
        resolve(parse(text), model)
    assert message in str(caught.value)


bounds = st.one_of(st.none(), st.integers(-40, 40))
layer_ranges = st.one_of(st.none(), st.tuples(bounds, bounds))


def _values(default: Value) -> st.SearchStrategy[Value]:
    if isinstance(default, str):
        return st.sampled_from(["all-linear", "q_proj", "q_proj+mlp.down_proj"])
    if isinstance(default, bool):
        return st.integers(0, 1)
    return st.floats(0, 1, exclude_max=True) if isinstance(default, float) else st.integers(1, 10_000)


@st.composite
def random_method(draw: st.DrawFn) -> Method | None:
    name = draw(st.sampled_from([*INTRINSIC, *ADDED]))
    options = tuple((key, draw(_values(default))) for key, default in METHODS[name].items() if draw(st.booleans()))
    try:
        return Method(name, options, draw(layer_ranges))
    except RecipeError:
        return None


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    names = draw(st.lists(st.sampled_from([*PARTS, "all"]), min_size=1, unique=True))
    parts = []
    for name in names:
        methods: list[Method] = []
        for method in draw(st.lists(random_method(), max_size=3)):
            if method is not None and not {method.name, *TEXT_ONLY} & {other.name for other in methods}:
                methods.append(method)
        parts.append((name, tuple(methods)))
    return Recipe(tuple(parts), frozenset(draw(st.sets(st.sampled_from(names)))))


@given(recipes())
def test_printing_and_parsing_are_inverse(recipe: Recipe) -> None:
    assert parse(str(recipe)) == recipe


words = st.sampled_from(
    [*METHODS, *PARTS, "all", "r", "alpha", "targets", "all-linear", *"=+,()[]:?- ", "0", "4", "-1", "1e9", "٣", "\n"]
)


@given(st.one_of(st.text(), st.lists(words, max_size=12).map("".join)))
def test_random_text_raises_only_recipe_errors(text: str) -> None:
    try:
        recipe = parse(text)
        for model in (MISS, LLAVA):
            resolve(recipe, model)
    except RecipeError as error:
        assert "\n" not in str(error)


def test_importing_the_module_does_not_load_torch() -> None:
    code = "import sys, normtune.methods.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
