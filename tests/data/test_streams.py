"""What is known of the samples of a stream: their uid, and what a message says of them."""

from __future__ import annotations

import json

from thresher.data.streams import Seen, uid_of

UID = "ab" * 16


def test_a_uid_is_a_field_or_in_the_json() -> None:
    assert uid_of({"uid": UID}) == UID
    for content in (json.dumps({"uid": UID}), json.dumps({"uid": UID}).encode(), {"uid": UID}):
        assert uid_of({"__key__": "a", "json": content}) == UID
    for content in (b"{", "[" * 100_000, b"\xff", [UID], {"uid": 7}, {}, None, 7):
        assert uid_of({"__key__": "a", "json": content}) is None
    assert uid_of("text") is None


def test_a_message_has_the_number_the_members_and_the_first_key() -> None:
    seen = Seen()
    assert str(seen) == "no samples"
    for key, url in (("1", "a.tar"), ("2", "a.tar"), ("3", "b.tar"), ("4", "a.tar")):
        seen.add({"__key__": key, "__url__": url, "txt": b"", "json": json.dumps({"uid": UID})}, key)
    assert (seen.samples, seen.shards) == (4, 3)
    assert str(seen) == f"4 samples (members: json, txt; the first has the key '1' and the uid '{UID}')"
    many = Seen()
    many.add({f"{i:02d}": b"" for i in range(30)}, "k" * 100)
    assert many.listed() == ", ".join([*(f"{i:02d}" for i in range(12)), "..."])
    assert len(str(many)) < 220
    assert many.shards == 0
