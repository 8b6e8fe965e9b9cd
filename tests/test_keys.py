"""Keys: the ring, where its keys come from, the files that keep them, and `gatekeeper keys`."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwk

from gatekeeper import Gatekeeper, SettingsError
from gatekeeper.keyfiles import KeyFileError, Keys, generate, load_file, rotated, save_file
from gatekeeper.keys import Key, KeyRingError, KeyState, Ring, hkdf
from gatekeeper.settings import load_settings

SECRET = os.urandom(32)


def key(id: str = "k1", state: KeyState = KeyState.ACTIVE, secret: bytes | None = None) -> Key:
    return Key(id, "HS256", secret or os.urandom(32), state)


class TestRing:
    def test_one_key_is_active_and_each_has_an_id_of_its_own(self) -> None:
        for keys in ([], [key(state=KeyState.RETIRING)], [key("a"), key("b")]):
            with pytest.raises(KeyRingError, match="one that is active"):
                Ring(keys)
        with pytest.raises(KeyRingError, match="id of its own"):
            Ring([key(), key(state=KeyState.RETIRING)])

    def test_a_revoked_key_is_as_one_that_was_never_there(self) -> None:
        ring = Ring([key("a"), key("b", KeyState.REVOKED)])
        assert ring.find("b") is None
        assert len(ring.secrets("any")) == 1

    def test_the_active_key_s_secret_stands_last_and_each_purpose_has_secrets_of_its_own(self) -> None:
        ring = Ring([key("a"), key("b", KeyState.RETIRING), key("c", KeyState.PENDING)])
        assert ring.secrets("one")[-1] == ring.active.derive("one")
        assert len(ring.secrets("one")) == 3
        assert not set(ring.secrets("one")) & set(ring.secrets("two"))

    def test_a_ring_that_is_to_have_wrong_keys_keeps_those_it_has(self) -> None:
        ring = Ring([key("a")])
        version = ring.version
        with pytest.raises(KeyRingError):
            ring.replace([])
        assert (ring.active.id, ring.version) == ("a", version)
        ring.replace([key("b")])
        assert (ring.active.id, ring.find("a")) == ("b", None)
        assert ring.version != version

    def test_secrets_are_derived_as_rfc_5869_has_it(self) -> None:
        # Its test case 3: SHA-256, no salt, no info.
        found = hkdf(bytes.fromhex("0b" * 22), b"", 42)
        assert found.hex() == (
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
        )

    @pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
    def test_a_pem_with_other_line_ends_is_the_same_key(self, algorithm: str) -> None:
        pem = generate(algorithm).secret
        made = Key("a", algorithm, pem).derive("any")
        for other in (pem.replace(b"\n", b"\r\n"), b"\n" + pem + b"\n", b"Owner: us\n" + pem):
            assert Key("a", algorithm, other).derive("any") == made
        assert Key("a", algorithm, generate(algorithm).secret).derive("any") != made

    @pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
    def test_nothing_is_derived_of_a_public_key_or_of_what_is_no_key(self, algorithm: str) -> None:
        for pem in (
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            b"-----BEGIN PRIVATE KEY-----\n*\n-----END PRIVATE KEY-----\n",
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n",
        ):
            with pytest.raises(KeyRingError, match="private key"):
                Key("a", algorithm, pem).derive("any")

    def test_keys_that_somebody_cannot_use_are_not_taken(self) -> None:
        ring, old, new = Ring([key("a")]), key("a"), key("b")
        seen: list[tuple[Key, ...]] = []

        def refuse(keys: tuple[Key, ...]) -> None:
            seen.append(keys)
            if old not in keys:
                raise KeyRingError("key b: of no use")

        ring.checks.append(refuse)
        version = ring.version
        with pytest.raises(KeyRingError, match="of no use"):
            ring.replace([new])
        assert (ring.active.id, ring.version, ring.find("b")) == ("a", version, None)
        ring.replace([old])
        assert (seen, ring.active) == ([(new,), (old,)], old)

    def test_secrets_asked_for_while_keys_are_replaced_are_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        old, new = key("a"), key("b")
        ring, derive = Ring([old]), Key.derive

        def late(self: Key, purpose: str, length: int = 32) -> bytes:
            monkeypatch.setattr(Key, "derive", derive)
            ring.replace([new])  # another thread does
            return derive(self, purpose, length)

        monkeypatch.setattr(Key, "derive", late)
        assert ring.secrets("any") in ([old.derive("any")], [new.derive("any")])
        assert ring.secrets("any") == [new.derive("any")], "what is revoked verifies nothing afterwards"

    @pytest.mark.parametrize(
        ("algorithm", "secret"),
        [
            ("HS256", bytes(range(31))),
            ("HS384", bytes(range(47))),
            ("HS512", bytes(range(63))),
            ("A256GCM", bytes(range(31))),
            ("A256GCM", bytes(range(33))),
            ("HS256", b"x" * 32),
            ("HS256", b"abcabcabcabcabcabcabcabcabcabcabcabc"),
            ("HS256", b"please-changeme-before-production-0"),
            ("HS256", b"django-insecure-3k2j4h5k2j3h4k5j2h3k4j5"),
            ("RS256", bytes(range(64))),
            ("none", bytes(range(32))),
            ("HS257", bytes(range(32))),
        ],
    )
    def test_a_weak_key_is_refused_and_its_secret_not_shown(self, algorithm: str, secret: bytes) -> None:
        with pytest.raises(KeyRingError) as error:
            Key("k", algorithm, secret)
        assert secret.decode("latin-1") not in str(error.value)

    def test_no_repr_shows_a_secret(self) -> None:
        ring = Ring([Key("k", "HS256", SECRET)])
        assert SECRET.hex() not in repr(ring)
        assert str(SECRET)[2:-1] not in repr(ring)


class TestSettings:
    def ring(self, keys: Any) -> Ring:
        return Keys(load_settings({"keys": keys}).keys).ring

    def test_the_first_of_several_signs_and_the_others_retire(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEW", os.urandom(32).hex())
        monkeypatch.setenv("OLD", os.urandom(32).hex())
        ring = self.ring(["env:NEW", "env:OLD"])
        assert [one.state for one in ring.keys] == [KeyState.ACTIVE, KeyState.RETIRING]
        again = self.ring(["env:NEW"])
        assert again.active.id == ring.active.id, "the id of a secret is the same in each process"

    def test_a_path_that_no_file_has_is_wrong_settings(self) -> None:
        """It is told with all else that is wrong."""
        with pytest.raises(SettingsError, match=r"keys\[0\]"):
            Gatekeeper({"keys": ["file:keys\0.json"], "session": {"kind": "store"}})

    def test_a_secret_may_stand_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text(os.urandom(32).hex() + "\n")
        assert self.ring(f"file:{tmp_path}/key").active.algorithm == "HS256"

    @pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
    def test_a_pem_needs_its_algorithm_to_be_told(self, tmp_path: Path, algorithm: str) -> None:
        (tmp_path / "pem").write_bytes(generate(algorithm).secret)
        with pytest.raises(SettingsError, match="algorithm"):
            self.ring([f"file:{tmp_path}/pem"])
        assert self.ring([{"key": f"file:{tmp_path}/pem", "algorithm": algorithm}]).active.algorithm == algorithm

    @pytest.mark.parametrize(
        ("keys", "told"),
        [
            ([], "keys: expected some"),
            (["env:NO_SUCH_VARIABLE"], r"keys\[0\]: expected the environment variable NO_SUCH_VARIABLE to be set"),
            (["file:/no/such/file"], r"keys\[0\]: /no/such/file: No such file"),
            (["file:/dev/zero"], r"keys\[0\]: /dev/zero: expected a regular file"),
            (["file:/etc"], r"keys\[0\]: /etc: expected a regular file"),
            (["short"], r"keys\[0\]: key [0-9a-f]{8}: expected at least 32 bytes"),
            ([7], "keys: expected a list of"),
            ([{"key": "env:X", "kind": 1}], r"keys\[0\]\.kind: unknown key"),
        ],
    )
    def test_what_is_wrong_with_them_is_told_with_its_place(self, keys: Any, told: str) -> None:
        with pytest.raises(SettingsError, match=told) as error:
            Gatekeeper({"keys": keys, "session": {"kind": "token"}})
        assert "short" not in str(error.value).replace("shorter", "")

    def test_settings_do_not_show_a_secret(self) -> None:
        secret = os.urandom(32).hex()
        assert secret not in repr(load_settings({"keys": [secret]}))

    def test_a_file_that_changes_is_read_again_and_a_wrong_one_is_not(self, tmp_path: Path) -> None:
        path, said = tmp_path / "keys.json", list[str]()
        first, second = key("first"), key("second", KeyState.PENDING)
        save_file(path, [(first, 0)])
        keys = Keys(load_settings({"keys": [f"file:{path}"]}).keys, said.append)
        assert keys.ring.find("second") is None
        save_file(path, [(first, 0), (second, 0)])
        keys()
        assert keys.ring.find("second") is not None
        path.write_text('{"keys": []}')
        keys()
        keys()
        assert keys.ring.active.id == "first"
        assert len(said) == 1

    def test_a_file_with_a_key_that_tokens_cannot_use_is_told_and_not_taken(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        first = key("first")
        save_file(path, [(first, 0)])
        keeper = Gatekeeper({"keys": [f"file:{path}"], "session": {"kind": "token"}})
        assert keeper.keys is not None
        said = list[str]()
        keeper.keys._warn = said.append
        members = json.loads(path.read_text())["keys"]
        other = jwk.ECKey.generate_key("P-384").as_dict(private=True)
        members.append({**other, "kid": "other", "alg": "ES256", "state": "pending"})
        path.write_text(json.dumps({"keys": members}))
        keeper.keys()
        keeper.keys()
        assert [one.id for one in keeper.keys.ring.keys] == ["first"]
        (line,) = said
        assert line.startswith("the keys are as they were: ")
        assert "key other: expected a key on the curve P-256" in line
        with pytest.raises(SettingsError, match="key other: expected a key on the curve P-256"):
            Gatekeeper({"keys": [f"file:{path}"], "session": {"kind": "token"}})
        keeper.close()


class TestFiles:
    @pytest.mark.parametrize(
        "algorithm", ["HS256", "HS384", "HS512", "A256GCM", "RS256", "PS256", "ES256", "EdDSA"]
    )
    def test_a_key_of_each_algorithm_survives_a_file(self, tmp_path: Path, algorithm: str) -> None:
        made = generate(algorithm, KeyState.ACTIVE, now=1_800_000_000)
        save_file(tmp_path / "keys", [(made, 7)])
        ((found, since),) = load_file(tmp_path / "keys")
        assert (found.id, found.algorithm, found.state, found.created, since) == (
            made.id, algorithm, KeyState.ACTIVE, 1_800_000_000, 7,
        )  # fmt: skip
        assert found.is_private
        assert found.derive("any") == found.derive("any")
        if found.is_symmetric:
            assert found.secret == made.secret

    def test_a_file_is_for_its_owner_alone_and_a_failed_write_leaves_the_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        save_file(path, [(key(), 0)])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        before = path.read_bytes()
        with pytest.raises(KeyFileError):
            save_file(tmp_path / "no" / "folder", [(key(), 0)])
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["keys"]

    def test_a_key_goes_from_pending_over_active_and_retiring_to_nothing(self) -> None:
        day = 86_400
        keys = [(key("a", KeyState.ACTIVE), 0), (key("b", KeyState.PENDING), 0)]
        keys = rotated(keys, day, keep=30 * day)
        assert [(one.id, str(one.state)) for one, _ in keys] == [("b", "active"), ("a", "retiring")]
        keys = rotated([*keys, (key("c", KeyState.PENDING), day)], 2 * day, keep=30 * day)
        assert [one.id for one, _ in keys] == ["c", "b", "a"]
        keys = rotated(keys, 31 * day, keep=30 * day)
        assert "a" not in [one.id for one, _ in keys]
        assert Ring([one for one, _ in keys]).active.id not in ("a", "b", "c"), "a new one, for none was pending"

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "[]", "{}", '{"keys": 7}', '{"keys": [7]}', '{"keys": [{}]}',
            '{"keys": [{"kid": "a", "alg": "none", "kty": "oct", "k": "AAAA"}]}',
            '{"keys": [{"kid": "a", "alg": "HS256", "kty": "oct", "k": "AAAA"}]}',
            '{"keys": [{"kid": "a", "alg": "HS256", "kty": "oct", "k": 7}]}',
            '{"keys": [{"kid": "a", "alg": "RS256", "kty": "RSA", "n": "AQAB"}]}',
            '{"keys": [{"kid": "../../a", "alg": "HS256", "kty": "oct", "k": "AAAA"}]}',
            '{"keys": [{"kid": "a", "alg": "HS256", "kty": "oct", "k": "AAAA", "state": "asleep"}]}',
            '{"keys":' * 2000,
        ],
    )  # fmt: skip
    def test_what_is_no_file_of_keys_is_a_clear_error(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "keys").write_text(text)
        with pytest.raises((KeyFileError, KeyRingError), match="expected"):
            load_file(tmp_path / "keys")


class TestCommand:
    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("gatekeeper"), "keys", *words],
            capture_output=True,
            text=True,
            check=False,
        )

    def test_generate_prints_a_secret_that_settings_take(self) -> None:
        done = self.run("generate")
        assert done.returncode == 0
        assert Keys(load_settings({"keys": [done.stdout.strip()]}).keys).ring.active.algorithm == "HS256"
        assert self.run("generate").stdout != done.stdout

    def test_a_file_is_begun_added_to_listed_and_rotated(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        assert self.run("generate", "--file", path).stdout.split()[1:] == ["HS256", "active"]
        assert self.run("generate", "--file", path, "--algorithm", "ES256").stdout.split()[1:] == [
            "ES256",
            "pending",
        ]
        listed = self.run("list", path).stdout.splitlines()
        assert [line.split()[2] for line in listed] == ["active", "pending"]
        done = self.run("rotate", path)
        assert [line.split()[1:3] for line in done.stdout.splitlines()] == [
            ["ES256", "active"],
            ["HS256", "retiring"],
        ]
        assert done.stderr == ""
        assert "no key was pending" in self.run("rotate", path).stderr
        secrets = [member.get("k", "") + member.get("d", "") for member in json.loads(path.read_text())["keys"]]
        assert not any(secret and secret in done.stdout for secret in secrets)

    def test_what_goes_wrong_is_told_on_standard_error(self, tmp_path: Path) -> None:
        for words in (("list", tmp_path / "none"), ("rotate", tmp_path), ("generate", "--algorithm", "HS512")):
            done = self.run(*words)
            assert done.returncode == 1
            assert done.stdout == ""
            assert done.stderr
        assert "Traceback" not in self.run("rotate", tmp_path / "none", "--keep", "long").stderr
