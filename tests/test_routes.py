"""Paths in one spelling, patterns, the table of patterns, and the router that takes the most specific."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gatekeeper.errors import GatekeeperError
from gatekeeper.http.message import ScopeRequest
from gatekeeper.http.routes import Pattern, PatternError, Router, Table, host_of, normalise


def request(path: str, method: str = "GET", host: str | None = None) -> ScopeRequest:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    return ScopeRequest({"type": "http", "method": method, "path": path, "headers": headers, "client": None})


PATHS = st.lists(
    st.sampled_from(["", ".", "..", "a", "b", "api", "x.y", "...", ".a", "é", "%2e", "\n", "a\n"])
).map(lambda segments: "/" + "/".join(segments))
"""Paths as clients bend them."""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a", "/a"),
        ("/a/b", "/a/b"),
        ("/a/", "/a"),
        ("/a//b", "/a/b"),
        ("//a", "/a"),
        ("///", "/"),
        ("/./a", "/a"),
        ("/a/.", "/a"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/a/..", "/"),
        ("/..", "/"),
        ("/../../a", "/a"),
        ("/a/b/../../../c", "/c"),
        ("/a//../b", "/b"),
        ("/.well-known/x", "/.well-known/x"),
        ("/a/...", "/a/..."),
        ("/a/.b/", "/a/.b"),
        ("/a./b", "/a./b"),
        ("/login\n", "/login"),
        ("/login/\n", "/login"),
        ("/a/..\n", "/"),
        ("/\n", "/"),
        ("/a\nb", "/a\nb"),
        ("/%2e%2e/a", "/%2e%2e/a"),  # the path comes decoded: this was a doubly encoded one
    ],
)
def test_a_path_has_one_spelling(path: str, expected: str) -> None:
    assert normalise(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("login", "/login"), ("a/b", "/a/b"), ("..", "/"), ("../login", "/login"), ("./a/", "/a")],
)
def test_a_path_that_lacks_its_first_slash_gets_it(path: str, expected: str) -> None:
    """WSGI servers hand over `POST login HTTP/1.1` as it came, and Werkzeug routes it as /login."""
    assert normalise(path) == expected


@settings(max_examples=300, deadline=None)
@given(PATHS | st.text().map("/".__add__))
def test_a_normal_path_has_no_untidy_segment_and_stays_as_it_is(path: str) -> None:
    tidy = normalise(path)
    assert tidy.startswith("/")
    assert "//" not in tidy
    assert not {".", ".."} & set(tidy.split("/"))
    assert tidy == "/" or not tidy.endswith("/")
    assert normalise(tidy) == tidy


@settings(max_examples=200, deadline=None)
@given(st.text("./a\n"))
def test_a_path_without_its_first_slash_is_as_tidy(path: str) -> None:
    tidy = normalise(path)
    assert "//" not in tidy
    assert not {".", ".."} & set(tidy.split("/"))
    assert normalise(tidy) == tidy


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, ""),
        ("", ""),
        ("example.com", "example.com"),
        ("Example.COM", "example.com"),
        ("example.com:8080", "example.com"),
        ("example.com.", "example.com"),
        ("example.com.:443", "example.com"),
        (" example.com ", "example.com"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[::1]:8080", "[::1]"),
        ("[2001:DB8::1]:80", "[2001:db8::1]"),
        (":80", ""),
    ],
)
def test_a_host_is_lower_case_without_port_and_final_dot(field: str | None, expected: str) -> None:
    assert host_of(field) == expected


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/", "/"),
        ("/login", "/login"),
        ("/login/", "/login"),
        ("//a/./b", "/a/b"),
        ("/a.b", "/a.b"),
        ("/a+b(c)", "/a+b(c)"),
        ("/*", "/"),
        ("/*", "/a/b"),
        ("/api/*", "/api"),
        ("/api/*", "/api/"),
        ("/api/*", "/api/a/b"),
        ("/users/{id}", "/users/7"),
        ("/users/{id}", "/users/a\nb"),
        ("/users/{id}/posts/{post}", "/users/7/posts/8"),
        ("/files/{name:path}", "/files/a"),
        ("/files/{name:path}", "/files/a/b/c"),
        ("/files/{name:path}/edit", "/files/a/b/edit"),
        ("/{a}/*", "/x"),
        ("/{a}/*", "/x/y/z"),
        ("/v{major}/x", "/v2/x"),
        ("/{name}.json", "/list.json"),
        ("/é", "/é"),
    ],
)
def test_a_pattern_covers_its_paths(pattern: str, path: str) -> None:
    assert Pattern(pattern).covers("GET", "", path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/", "/a"),
        ("/login", "/login/x"),
        ("/login", "/Login"),
        ("/login", "/xlogin"),
        ("/a.b", "/axb"),
        ("/api/*", "/apis"),
        ("/api/*", "/v1/api/a"),
        ("/users/{id}", "/users"),
        ("/users/{id}", "/users/"),
        ("/users/{id}", "/users/7/x"),
        ("/users/{id}", "/users/7\n/x"),
        ("/files/{name:path}", "/files"),
        ("/files/{name:path}", "/files/"),
        ("/files/{name:path}/edit", "/files/edit"),
        ("/{a}/*", "/"),
        ("/v{major}/x", "/v/x"),
        ("/{name}.json", "/listxjson"),
    ],
)
def test_a_pattern_covers_nothing_else(pattern: str, path: str) -> None:
    assert not Pattern(pattern).covers("GET", "", path)


@pytest.mark.parametrize(
    ("pattern", "method", "covered"),
    [
        ("/x", "BREW", True),
        ("POST /x", "POST", True),
        ("POST /x", "GET", False),
        ("GET /x", "HEAD", True),
        ("get /x", "GET", True),
        ("HEAD /x", "GET", False),
        ("PUT|PATCH /x", "PATCH", True),
        ("PUT|PATCH /x", "POST", False),
        ("PUT|GET /x", "HEAD", True),
        ("M-SEARCH /x", "M-SEARCH", True),
    ],
)
def test_a_pattern_covers_its_methods_and_get_covers_head(pattern: str, method: str, covered: bool) -> None:
    assert Pattern(pattern).covers(method, "", "/x") is covered


@pytest.mark.parametrize(
    ("pattern", "host", "covered"),
    [
        ("/x", "anything", True),
        ("example.com/x", "example.com", True),
        ("Example.COM/x", "example.com", True),
        ("example.com/x", "www.example.com", False),
        ("example.com/x", "example.com.evil.net", False),
        ("example.com/x", "", False),
        ("GET example.com/x", "example.com", True),
        ("*.example.com/x", "www.example.com", True),
        ("*.example.com/x", "a.b.example.com", True),
        ("*.example.com/x", "example.com", False),
        ("*.example.com/x", "badexample.com", False),
        ("localhost/x", "localhost", True),
        ("127.0.0.1/x", "127.0.0.1", True),
        ("[::1]/x", "[::1]", True),
    ],
)
def test_a_pattern_covers_its_host(pattern: str, host: str, covered: bool) -> None:
    assert Pattern(pattern).covers("GET", host, "/x") is covered


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "login", "POST", "POST login", "POST  ", "GET POST /x", "a b c /x", "GET| /x", "|GET /x", "G(T /x",
        "example.com:80/x", "*/x", "*.*.com/x", "a.*.com/x", "{host}/x", "http://example.com/x",
        ".example.com/x", "exam\N{LATIN SMALL LETTER E WITH ACUTE}.com/x", "[::1/x",
        "/a*", "/*/b", "/a/*/b", "/**", "/*a", "/a/**",
        "/{", "/}", "/{}", "/{a", "/a}", "/{1a}", "/{a-b}", "/{a b}", "/{a:int}", "/{a:}", "/{{a}}", "/{a}}",
        "/{a}{b}", "/{a}-{b}", "/{a}/{a}", "/{a:path}/{b}", "/{a:path}/{b:path}", "/{a:path}{b}",
        "/" + "a" * 1024,
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern(text)
    assert "expected a pattern" in str(caught.value)
    assert isinstance(caught.value, GatekeeperError)
    assert isinstance(caught.value, ValueError)


def test_the_error_does_not_repeat_the_text() -> None:
    with pytest.raises(PatternError) as caught:
        Pattern("/hunter2*")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 5, b"/x", ["/x"]])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(PatternError):
        Pattern(value)


def test_a_pattern_shows_what_it_was_made_from() -> None:
    pattern = Pattern("POST|GET Example.com/a/../b/")
    assert repr(pattern) == "Pattern('POST|GET Example.com/a/../b/')"
    assert pattern.methods == frozenset({"POST", "GET", "HEAD"})
    assert (pattern.host, pattern.path) == ("example.com", "/b")
    assert pattern.exact
    assert not Pattern("/a/*").exact
    assert not Pattern("/{a}").exact


PIECES = st.sampled_from(
    ["/", "{a}", "{b:path}", "{a", "*", "GET ", "x", "..", "*.", "é", "|", "(?P<a>", "\\"],
)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("{}/*:|ab. path[]\\GET\n") | st.lists(PIECES).map("".join))
def test_no_text_makes_anything_but_a_pattern_or_a_pattern_error(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        return
    assert pattern.path == normalise(pattern.path)
    assert pattern.covers("GET", "", "/") in (True, False)


def test_a_table_gives_all_that_match_in_their_order() -> None:
    entries: list[tuple[Pattern | None, str]] = [
        (Pattern("/api/*"), "open"),
        (None, "all"),
        (Pattern("/api/users"), "exact"),
        (Pattern("POST /api/users"), "post"),
        (Pattern("/{any}/users"), "variable"),
        (Pattern("/other"), "other"),
        (Pattern("/api/users"), "exact again"),
    ]
    assert Table(entries).match(request("/api/users")) == ("open", "all", "exact", "variable", "exact again")
    assert Table(entries).match(request("/nowhere")) == ("all",)
    backwards = Table(entries[::-1])
    assert backwards.match(request("/api/users", "POST")) == (
        "exact again", "variable", "post", "exact", "all", "open"
    )  # fmt: skip


def test_an_empty_table_gives_nothing_and_one_without_patterns_gives_all() -> None:
    nothing: list[tuple[Pattern | None, int]] = []
    assert Table(nothing).match(request("/x")) == ()
    assert Table([(None, 1), (None, 2)]).match(request("/x")) == (1, 2)


@pytest.mark.parametrize(
    "path",
    ["/login", "//login", "/login/", "/./login", "/x/../login", "/login/.", "/login\n", "/../login", "login"],
)
def test_no_spelling_of_a_path_gets_round_its_rule(path: str) -> None:
    assert Table([(Pattern("/login"), "rule")]).match(request(path)) == ("rule",)


def test_an_untidy_path_matches_as_it_came_too() -> None:
    """An application may route on the path as it came: `/open/../x` is both."""
    table = Table([(Pattern("/open/*"), "open"), (Pattern("/x"), "x"), (Pattern("/{a:path}"), "any")])
    assert table.match(request("/open/../x")) == ("open", "x", "any")


def test_a_table_reads_the_host_of_the_request() -> None:
    table = Table([(Pattern("example.com/*"), "one"), (Pattern("*.example.com/*"), "sub"), (Pattern("/*"), "any")])
    assert table.match(request("/x", host="Example.com:8080")) == ("one", "any")
    assert table.match(request("/x", host="www.example.com.")) == ("sub", "any")
    assert table.match(request("/x")) == ("any",)


PATTERNS = [
    "/", "/*", "/a", "/a/*", "/a/b", "/b", "/{x}", "/{x}/b", "/a/{x}", "/{x:path}", "/a/{x:path}", "/a{x}", "/.a/*",
    "POST /a", "GET /a/*", "HEAD|PUT /{x}", "h.com/a", "*.h.com/*", "GET h.com/{x}", "/a/{x}/b", "/../a","/{x}a/*",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.none() | st.sampled_from(PATTERNS), max_size=12),
    path=st.lists(st.sampled_from(["", ".", "..", "a", "b", "aa", ".a", "a\n"])).map(
        lambda parts: "/" + "/".join(parts)
    ),
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]),
    host=st.sampled_from([None, "h.com", "H.com.:80", "x.h.com", "other"]),
)
def test_a_table_agrees_with_trying_each_pattern_in_order(
    texts: list[str | None], path: str, method: str, host: str | None
) -> None:
    entries = [(None if text is None else Pattern(text), place) for place, text in enumerate(texts)]
    spellings = {normalise(path)}
    if path != normalise(path):
        spellings |= {path, path.rstrip("/\n")}  # an application may do without the tail alone
    expected = tuple(
        place
        for pattern, place in entries
        if pattern is None or any(pattern.covers(method, host_of(host), spelling) for spelling in spellings)
    )
    assert Table(entries).match(request(path, method, host)) == expected


def most_specific(texts: list[str], method: str, host: str, path: str) -> int | None:
    """Which pattern a router should take, by trying and sorting all of them."""

    def specificity(place: int) -> tuple[object, ...]:
        words = texts[place].split()
        named_host, slash, rest = words[-1].partition("/")
        pattern = normalise(slash + rest)
        literal = pattern.removesuffix("/*").partition("{")[0]
        wildcard = named_host.startswith("*.")
        return (
            "{" in pattern or "*" in pattern,
            -len(literal),
            not named_host,
            wildcard,
            -len(named_host),
            len(words) == 1,
            place,
        )

    covering = [place for place, text in enumerate(texts) if Pattern(text).covers(method, host, normalise(path))]
    return min(covering, key=specificity, default=None)


MORE_PATTERNS = [*PATTERNS, "*.x.h.com/*", "*.h.com/a", "/{y}", "/a/{y}", "GET /{x:path}", "PUT *.h.com/*"]


@settings(max_examples=500, deadline=None)
@given(
    texts=st.lists(st.sampled_from(MORE_PATTERNS), max_size=12),
    path=st.lists(st.sampled_from(["", ".", "..", "a", "b", "aa", ".a", "a\n"])).map(
        lambda parts: "/" + "/".join(parts)
    ),
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]),
    host=st.sampled_from([None, "h.com", "H.com.:80", "x.h.com", "y.x.h.com", "other"]),
)
def test_a_router_agrees_with_sorting_all_that_match(
    texts: list[str], path: str, method: str, host: str | None
) -> None:
    router = Router((Pattern(text), place) for place, text in enumerate(texts))
    assert router.find(request(path, method, host)) == most_specific(texts, method, host_of(host), path)


@pytest.mark.parametrize(
    ("better", "worse", "path"),
    [
        ("/a/b", "/a/{x}", "/a/b"),
        ("/a/b", "GET h.com/a/*", "/a/b"),  # an exact path is before all that is variable
        ("/a/b/*", "/a/*", "/a/b/c"),
        ("/a/b/*", "GET h.com/a/*", "/a/b/c"),
        ("/a/{x}", "/a/*", "/a/b"),
        ("/a/*", "/{x:path}", "/a"),
        ("/a/*", "/*", "/a"),
        ("h.com/a", "/a", "/a"),
        ("h.com/a", "*.com/a", "/a"),
        ("*.com/a", "/a", "/a"),
        ("*.com/a", "GET /a", "/a"),
        ("GET /a", "/a", "/a"),
        ("GET /a/*", "/a/*", "/a/b"),
        ("GET|POST h.com/a", "h.com/a", "/a"),
    ],
)
def test_the_more_specific_route_is_taken_whatever_the_order(better: str, worse: str, path: str) -> None:
    entries = [(Pattern(better), "better"), (Pattern(worse), "worse")]
    for pairs in (entries, entries[::-1]):
        assert Router(pairs).find(request(path, host="h.com")) == "better"
    assert Router(entries[1:]).find(request(path, host="h.com")) == "worse"


def test_of_two_routes_that_are_as_specific_the_first_is_taken() -> None:
    one, other = (Pattern("/a/{x}"), 1), (Pattern("/a/{y:path}"), 2)
    assert Router([one, other]).find(request("/a/b")) == 1
    assert Router([other, one]).find(request("/a/b")) == 2


def test_a_route_whose_method_or_host_differs_gives_way_to_a_wider_one() -> None:
    router = Router([(Pattern("POST /a"), 1), (Pattern("other.com/a"), 2), (Pattern("/*"), 3)])
    assert router.find(request("/a", "POST")) == 1
    assert router.find(request("/a", host="other.com")) == 2
    assert router.find(request("/a")) == 3


def test_a_router_without_a_route_for_a_request_finds_nothing() -> None:
    nothing: list[tuple[Pattern, int]] = []
    assert Router(nothing).find(request("/")) is None
    assert Router([(Pattern("/a/*"), 1)]).find(request("/ab")) is None
    assert Router([(Pattern("/a"), 1)]).find(request("/a/b")) is None


@pytest.mark.parametrize(
    "path", ["/open/../admin/x", "//admin/x", "/admin/./x", "/admin/x/", "admin/x", "/admin/x\n"]
)
def test_a_router_goes_by_the_normalised_path_alone(path: str) -> None:
    router = Router([(Pattern("/open/*"), "open"), (Pattern("/admin/*"), "admin")])
    assert router.find(request(path)) == "admin"


def test_get_routes_cover_head_and_the_bare_prefix_is_covered() -> None:
    router = Router([(Pattern("GET /api/*"), 1)])
    assert [router.find(request("/api", method)) for method in ("GET", "HEAD", "POST")] == [1, 1, None]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/a/{x}", "/a/{y}", True),
        ("/a/", "/a", True),
        ("GET|POST /a", "post|get /a", True),
        ("GET /a", "GET|HEAD /a", True),
        ("H.com/a", "h.com/a", True),
        ("/a/{x}", "/a/{x:path}", False),
        ("/a/*", "/a/{x:path}", False),
        ("/a", "GET /a", False),
        ("/a", "h.com/a", False),
        ("*.h.com/a", "h.com/a", False),
    ],
)
def test_patterns_of_the_same_requests_have_one_meaning(one: str, other: str, same: bool) -> None:
    assert (Pattern(one).meaning == Pattern(other).meaning) is same


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([text for text in PATTERNS if "{" not in text and "h.com" not in text]), PATHS)
def test_a_literal_pattern_covers_what_its_text_says(text: str, path: str) -> None:
    tidy, pattern = normalise(path), Pattern(text)
    assume(pattern.methods is None)
    if pattern.exact:
        assert pattern.covers("GET", "", tidy) is (tidy == pattern.path)
    else:
        stem = pattern.path.removesuffix("/*")
        assert pattern.covers("GET", "", tidy) is (tidy == stem or tidy.startswith(stem + "/"))


@pytest.mark.parametrize("tail", ["\n/.", "/.", "\n/", "/..\n", "/x/.."])
def test_a_path_is_tidied_however_long_its_tail(tail: str) -> None:
    tidy = normalise("/b" + tail * 20_000)
    assert normalise(tidy) == tidy
    assert not tidy.endswith("\n")
