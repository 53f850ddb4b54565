import hashlib
import multiprocessing
import os
import stat

import pytest

from samssl.config import UserError
from samssl.data.pseudonyms import KEY_VARIABLE, key_path, listing_path, open_key, read_listing, write_listing


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "new" / "pseudonyms.key"
    key = open_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert open_key(path) == key
    assert open_key(tmp_path / "other.key").secret != key.secret
    assert os.listdir(path.parent) == [path.name]


def _fingerprint(path):
    return open_key(path).fingerprint


def test_processes_that_make_it_at_once_agree(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        fingerprints = pool.map(_fingerprint, [tmp_path / "k" / "key"] * 64, chunksize=1)
    assert len(set(fingerprints)) == 1
    assert os.listdir(tmp_path / "k") == ["key"]


def test_pseudonyms_follow_from_the_key_and_cannot_be_guessed_without(tmp_path):
    one, other = open_key(tmp_path / "one"), open_key(tmp_path / "other")
    assert one.pseudonym("set", "patient", "Doe^Jane") == one.pseudonym("set", "patient", "Doe^Jane")
    assert one.pseudonym("set", "patient", "Doe^Jane") != other.pseudonym("set", "patient", "Doe^Jane")
    assert one.pseudonym("set", "patient", "a") != one.pseudonym("set", "case", "a")
    guess = hashlib.sha256(b"set/patient/Doe^Jane").hexdigest()[:12]
    assert one.pseudonym("set", "patient", "Doe^Jane") != f"set-{guess}"


def test_neither_printing_nor_the_fingerprint_gives_the_key_away(tmp_path):
    key = open_key(tmp_path / "key")
    text = f"{key} {key!r} {key.fingerprint} {hashlib.sha256(key.secret).hexdigest()}"
    assert key.secret.hex() not in text
    assert len(key.fingerprint) == 16
    assert not hashlib.sha256(key.secret).hexdigest().startswith(key.fingerprint)


def test_where_the_key_lies(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "env"))
    assert key_path() == tmp_path / "env"
    assert key_path(tmp_path / "set") == tmp_path / "set"
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".samssl" / "pseudonyms.key"


@pytest.mark.parametrize("content", [b"", b"abc", b"00" * 16, b"zz" * 32, bytes(range(256))])
def test_what_is_no_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match="holds no key of pseudonyms"):
        open_key(tmp_path / "key")
    with pytest.raises(UserError, match="cannot be read or made"):
        open_key(tmp_path / "key" / "below_a_file")


def test_the_private_list_grows_and_is_for_its_owner(tmp_path):
    key = open_key(tmp_path / "key")
    write_listing(key, "set", {"set-1": ["a.png"], "set-2": ["b\udcff.png", 'c,"d".png']})
    path = write_listing(key, "set", {"set-3": ["e.png"]})
    assert path == listing_path(key, "set") == tmp_path / "listings" / "set.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_listing(path) == {
        "set-1": ["a.png"],
        "set-2": ["b\udcff.png", 'c,"d".png'],
        "set-3": ["e.png"],
    }
