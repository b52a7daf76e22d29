"""Network addresses: which texts are addresses, and their parts."""

from __future__ import annotations

import copy
import ipaddress
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.addresses import AddressError, HostPort, check_host
from deskrl.core.config import RunConfig, load_values
from deskrl.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7411", "127.0.0.1", 7411),
        ("[::1]:7411", "::1", 7411),
        ("[2001:DB8:0::1]:65535", "2001:db8::1", 65535),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("[::ffff:10.0.0.5]:1", "::ffff:10.0.0.5", 1),
        ("localhost:1", "localhost", 1),
        ("replay.example.org.:7411", "replay.example.org.", 7411),
        ("run_1-replay.ns.svc:7411", "run_1-replay.ns.svc", 7411),
        ("3com.example:80", "3com.example", 80),
        ("node7:080", "node7", 80),
    ],
)
def test_an_address_has_a_host_without_brackets_and_a_port(text: str, host: str, port: int) -> None:
    address = HostPort(text)
    assert (address.port, ipaddress_or_name(address.host)) == (port, ipaddress_or_name(host))
    assert HostPort(address) == HostPort.of(address.host, port) == HostPort.of(f"[{address.host}]", port)


def ipaddress_or_name(host: str) -> object:
    return ipaddress.ip_address(host) if ":" in host else host


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("http://10.0.0.5:5000", "is a URL", "omit the scheme"),
        ("grpc+tls://replay:7411", "is a URL", "omit the scheme"),
        ("user@host:1", "contains a user name", "omit the user name"),
        ("10.0.0.5:5000/v1", "contains a path", "omit the path"),
        ("my host:1", "contains a space", "write host:port"),
        ("host:1\n", "contains a space", "write host:port"),
        (" 127.0.0.1:1", "contains a space", "write host:port"),
        ("bücher.example:1", "contains a space or a character", "write host:port"),
        ("host:１２", "contains a space or a character", "write host:port"),
        ("::1:7411", "more than one colon", r"put an IPv6 address in brackets, such as \[::1\]:7411"),
        ("host:1:2", "more than one colon", "brackets"),
        ("host", "has no port", "write host:port"),
        ("[::1]", "has no port", "write host:port"),
        ("", "'' has no port", "write host:port"),
        (":7411", "no valid host name", "write host:port"),
        ("host:", "the port", "write host:port"),
        ("host:0", "the port", "write host:port"),
        ("host:65536", "the port", "write host:port"),
        ("host:+80", "the port", "write host:port"),
        ("host:8e3", "the port", "write host:port"),
        ("[::1]x:7411", "is not an address", "write host:port"),
        ("x[::1]:7411", "is not an address", "write host:port"),
        ("[localhost]:7411", "not an IPv6 address", "write host:port"),
        ("[::1:7411", "more than one colon", "brackets"),
        ("256.0.0.1:1", "not an IPv4 address", "write host:port"),
        ("10.0.0:1", "not an IPv4 address", "write host:port"),
        ("127.1:1", "not an IPv4 address", "write host:port"),
        ("-host:1", "no valid host name", "write host:port"),
        ("a..b:1", "no valid host name", "write host:port"),
        (f"{'a' * 64}:1", "no valid host name", "write host:port"),
    ],
)
def test_a_text_that_is_not_an_address_is_rejected_with_a_hint(text: str, message: str, hint: str) -> None:
    with pytest.raises(AddressError, match=message) as rejected:
        HostPort(text)
    assert re.search(hint, rejected.value.hint)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("key", ["replay.address", "inference.address", "desktop.remote.addresses"])
@pytest.mark.parametrize("text", ["http://10.0.0.5:5000", "user@host:1", "my host:1", "::1:7411", "host"])
def test_every_key_rejects_what_is_not_an_address_in_one_line(key: str, text: str) -> None:
    section, *_, last = key.split(".")
    value: object = {last: text}
    if section == "desktop":
        value = {"remote": {"addresses": [text]}}
    with pytest.raises(UserError, match=key) as rejected:
        load_values({section: value}, "run.toml")
    assert "\n" not in str(rejected.value)
    assert str(rejected.value).endswith(("replay.example:7411)", "[::1]:7411)"))


@pytest.mark.parametrize("key", ["replay.address", "inference.address"])
def test_an_ipv6_address_can_be_configured_as_a_value_and_as_an_option(key: str) -> None:
    section = key.split(".")[0]
    for config in (
        load_values({section: {"address": "[::1]:7411"}}, "run.toml"),
        load_values({}, "run.toml", [f"--{key}", "[::1]:7411"]),
        load_values({}, "run.toml", [f"--{key}=[::1]:7411"]),
    ):
        address = getattr(config, section).address
        assert (address, address.host, address.port) == ("[::1]:7411", "::1", 7411)


@pytest.mark.parametrize(
    "values", [["[::1]:1,[::1]:2"], ['["[::1]:1", "[::1]:2"]'], ["[::1]:1", "--desktop.remote.addresses", "[::1]:2"]]
)
def test_several_ipv6_addresses_can_be_given_as_an_option(values: list[str]) -> None:
    config = load_values({}, "run.toml", ["--desktop.remote.addresses", *values])
    assert config.desktop.remote.addresses == ("[::1]:1", "[::1]:2")
    assert [address.host for address in config.desktop.remote.addresses] == ["::1", "::1"]


def test_replicas_use_the_ports_after_an_ipv6_address_and_listen_on_another_host() -> None:
    config = load_values({"inference": {"address": "[2001:db8::7]:7421", "listen_host": "::"}}, "run.toml")
    assert config.inference.replica_address(2) == "[2001:db8::7]:7423"
    assert config.inference.listen_address(2) == "[::]:7423"
    named = load_values({"inference": {"listen_host": "[::1]"}}, "run.toml")
    assert named.inference.listen_host == "::1"


@pytest.mark.parametrize("key", ["replay.listen_host", "inference.openai_host", "security.metrics_host"])
@pytest.mark.parametrize("host", ["0.0.0.0:80", "http://host", "a b", "user@host", "", "[::1"])
def test_a_host_with_a_port_or_a_scheme_is_rejected(key: str, host: str) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError, match=f"{key}.*hint: .*write a host name or an IP address"):
        load_values({section: {name: host}}, "run.toml")


def test_an_address_survives_copies_pickles_and_configuration_files() -> None:
    address = HostPort("[::1]:7411")
    for copied in (copy.deepcopy(address), pickle.loads(pickle.dumps(address))):
        assert (copied, copied.host, copied.port) == ("[::1]:7411", "::1", 7411)
    config = RunConfig.model_validate({"replay": {"address": "[::1]:7411"}})
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again.replay.address.host == "::1" and again.inference.address.port == 7421


@given(st.one_of(st.text(), st.text("[]:.@/% abc019-_"), st.ip_addresses(v=6).map(lambda ip: f"[{ip}]:1")))
def test_any_text_is_an_address_of_the_same_text_or_an_address_error(text: str) -> None:
    for parse in (HostPort, check_host):
        try:
            parsed = parse(text)
        except AddressError as error:
            assert error.hint and str(error).isprintable()
        else:
            assert parse(parsed) == parsed
