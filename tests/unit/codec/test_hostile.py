from __future__ import annotations

import datetime as dt
import decimal
import json
import random
import sys
import uuid

import pytest

from gw_celery import codec, errors
from tests.unit.codec import models

DOCUMENTS = 10_000
#: Modules of the standard library that are never imported, so that an import would show.
NEVER_IMPORTED = ["this", "antigravity", "turtledemo", "idlelib.idle"]
MARKERS = [
    "~tuple", "~set", "~frozenset", "~dict", "~obj", "~bytes", "~str", "~int", "~float",
    "~datetime", "~date", "~time", "~timedelta", "~decimal", "~uuid", "~", "~eval", "__type__",
]  # fmt: skip
NAMES = [
    *(f"{name}@1" for name in NEVER_IMPORTED),
    *(f"{cls.__module__}.{cls.__qualname__}@1" for cls in (models.Doc, models.Point, models.Bag)),
    *(f"{cls.__module__}.{cls.__qualname__}@1" for cls in (models.Color, models.Access)),
    f"{models.Doc.__module__}.OutOfMemory@1", "Celsius@3", "Celsius@4", "os.system@1",
    "builtins.eval@1", "subprocess.Popen@1", "this", "", "@", "tests.unit.codec.models.registry@1",
]  # fmt: skip
KEYS = ["title", "body", "x", "y", "norm", "__class__", "__dict__", "__init__", "__value__", "a"]
LEAVES = [
    None, True, 0, 1, -1, 2.5, 10**30, "", "RED", "READ", "__class__", "1", "0x1", "nan", "AP8=",
    "2024-01-02", "2024-01-02T03:04:05+00:00", "03:04:05", "Europe/Paris", "this", "idlelib.idle",
    "\ud800", "00000000-0000-0000-0000-000000000000",
]  # fmt: skip


def document(random, depth=0):
    pick = random.random()
    if depth > 4 or pick < 0.2:
        return random.choice(LEAVES)
    children = [document(random, depth + 1) for _ in range(random.randrange(4))]
    if pick < 0.35:
        return children
    if pick < 0.5:
        return {random.choice(KEYS): child for child in children}
    if pick < 0.75:
        attributes = {random.choice(KEYS): child for child in children}
        payload = random.choice([attributes, attributes, children, random.choice(LEAVES)])
        return {"~obj": [random.choice(NAMES), payload]}
    if pick < 0.8:
        return {"~dict": [[child, random.choice(LEAVES)] for child in children]}
    payload = random.choice([children, children, random.choice(LEAVES)])
    return {random.choice(MARKERS): payload}


def outcome(text):
    try:
        models.knowing.loads(text)
    except errors.SerializationError:
        return "refused"
    return "read"


def test_random_documents_give_a_value_or_our_error_and_import_nothing():
    randomness = random.Random(20_260_101)
    # What reading a zone imports of the standard library, it imports here.
    models.knowing.loads('{"~datetime": ["2024-01-02", 0, "Europe/Paris"]}')
    before = set(sys.modules)
    assert before.isdisjoint(NEVER_IMPORTED)
    outcomes = [outcome(json.dumps(document(randomness))) for _ in range(DOCUMENTS)]
    assert set(sys.modules) == before
    assert min(outcomes.count("read"), outcomes.count("refused")) > DOCUMENTS / 10


def test_damaged_documents_give_a_value_or_our_error():
    randomness = random.Random(7)
    value = [
        (1, {2: b"x", "k": {models.Color.RED}}), models.Point(1.5, None), models.Doc([0]),
        models.Access(3), models.OutOfMemory(1, "GiB"), {"~tuple": 1}, 2**5000, "\ud800",
    ]  # fmt: skip
    original = models.knowing.dumps(value).encode()
    outcomes = set()
    for _ in range(DOCUMENTS // 5):
        damaged = bytearray(original)
        for _ in range(randomness.randrange(1, 4)):
            damaged[randomness.randrange(len(damaged))] = randomness.choice(b'"~{}[]:,01azAZ\xff')
        outcomes.add(outcome(bytes(damaged)))
    assert outcomes == {"read", "refused"}


class Trap:
    """Does something as soon as it is made, changed or dropped; never registered."""

    def __init__(self):
        pytest.fail("made")

    def __setattr__(self, name, value):
        pytest.fail("changed")


@pytest.mark.parametrize("name", [f"{__name__}.Trap@1", f"{__name__}.Trap", f"{__name__}:Trap@1"])
def test_a_class_that_is_loaded_but_not_registered_is_out_of_reach(name):
    text = json.dumps({"~obj": [name, {"a": 1}]})
    with pytest.raises(errors.SerializationError, match="is not registered here"):
        models.knowing.loads(text)


def test_kombus_own_markers_mean_nothing():
    value = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}
    assert models.knowing.loads(json.dumps(value)) == value


def test_attributes_cannot_change_the_class_of_an_object():
    bag = models.knowing.loads(
        json.dumps({"~obj": ["tests.unit.codec.models.Bag@1", {"__class__": "os._wrap_close"}]})
    )
    assert type(bag) is models.Bag
    assert bag.__class__ is models.Bag


#: Python hashes each multiple of this to 0.
MODULUS = 2**61 - 1
MULTIPLES = [n * MODULUS for n in range(4000)]
FLOODS = {
    "set": {"~set": MULTIPLES},
    "frozenset of tuples": {"~frozenset": [{"~tuple": [n]} for n in MULTIPLES]},
    "set of Decimals": {"~set": [{"~decimal": str(n)} for n in MULTIPLES]},
    # hash(-1) == hash(-2), at any depth.
    "set of tuples of small numbers": {
        "~set": [{"~tuple": [-1 - (n >> bit & 1) for bit in range(12)]} for n in range(4000)]
    },
    "dict": {"~dict": [[n, 0] for n in MULTIPLES]},
    "dict of objects": {
        "~dict": [
            [{"~obj": ["tests.unit.codec.models.Positive@1", {"value": n or 1}]}, 0]
            for n in MULTIPLES
        ]
    },
}


@pytest.mark.parametrize("flood", FLOODS)
def test_keys_that_were_made_to_have_one_hash_are_refused(flood):
    said = rf"(4000|3999) keys of a {flood.split()[0]} of 4000 have the same hash, over the limit"
    with pytest.raises(errors.SerializationError, match=said):
        models.knowing.loads(json.dumps(FLOODS[flood]))


LONG = 10**4200


@pytest.mark.parametrize(
    "wrapped", [lambda n: n, lambda n: (n,), models.Positive], ids=["bare", "tuple", "object"]
)
def test_long_numbers_and_decimals_that_were_made_to_have_one_hash_are_refused(wrapped):
    """Each comparison of these takes longer than reading both numbers."""
    keys = [wrapped(LONG + n * MODULUS) for n in range(16)]
    keys += [wrapped(decimal.Decimal(LONG + n * MODULUS)) for n in range(16, 32)]
    document = {"~set": [json.loads(models.knowing.dumps(key)) for key in keys]}
    with pytest.raises(
        errors.SerializationError, match=r"32 keys of a set .* over the limit of 16"
    ):
        models.knowing.loads(json.dumps(document))


VALUES = codec.Codec(models.registry, codec.Limits(values=1000))


@pytest.mark.parametrize("piece", ["{}", "[]", "0", '{"a":0}', '{"~set":[]}', '"[,{"'])
def test_a_document_of_too_many_values_is_refused_before_it_is_parsed(piece, monkeypatch):
    monkeypatch.setattr(json.JSONDecoder, "decode", lambda *_: pytest.fail("parsed"))
    with pytest.raises(errors.SerializationError, match=r"has .* values where 1000 are allowed"):
        VALUES.loads("[" + ",".join([piece] * 1001) + "]")


@pytest.mark.parametrize("text", ["[{,:" * 2000, '\\"[,{' * 2000, ',"\\' * 2000, "é," * 2000])
def test_text_is_one_value_whatever_is_in_it(text):
    assert VALUES.loads(VALUES.dumps([text, {text: text}])) == [text, {text: text}]


def test_a_document_of_too_many_values_is_not_written():
    assert VALUES.loads(VALUES.dumps([0] * 999)) == [0] * 999
    with pytest.raises(errors.SerializationError, match="has 1002 values where 1000 are allowed"):
        VALUES.dumps([0] * 1001)


def test_a_tuple_and_a_list_have_no_keys():
    for value in (MULTIPLES, tuple(MULTIPLES)):
        assert models.there_and_back(value) == value


def test_what_would_not_be_read_is_not_written():
    for value in (set(MULTIPLES), frozenset(MULTIPLES), dict.fromkeys(MULTIPLES)):
        with pytest.raises(errors.SerializationError, match="same hash, over the limit of 128"):
            models.knowing.dumps([value])


@pytest.mark.parametrize(
    "keys",
    [
        [*range(-5000, 5000), *MULTIPLES[:100], *(-n for n in MULTIPLES[:20])],
        [1 << bit for bit in range(7000)],
        [2.0**power for power in range(-1074, 1024)],
        [decimal.Decimal(n) / 7 for n in range(1000)],
        [(x, y, z) for x in range(-8, 8) for y in range(-8, 8) for z in range(-8, 8)],
        [models.Positive(n) for n in range(1, 1000)],
        [uuid.UUID(int=n << 61) for n in range(1000)],
        [dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=n) for n in range(1000)],
        [dt.timedelta(seconds=n) for n in range(-1000, 1000)],
        [str(n) for n in range(1000)],
        [b"%d" % n for n in range(1000)],
    ],
    ids=lambda keys: type(keys[-1]).__name__,
)
def test_many_keys_are_read_and_some_of_them_may_share_a_hash(keys):
    value = [{*keys}, frozenset(keys), {key: str(key) for key in keys}]
    assert models.there_and_back(value) == value
