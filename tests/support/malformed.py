"""HTTP requests as no client should send them, the same ones every time, and what comes back."""

import random
import socket
from collections.abc import Iterator
from contextlib import suppress

TRANSCRIBE = b"/v1/audio/transcriptions"
PATHS = (
    TRANSCRIBE,
    b"/v1/datastores",
    b"/v1/datastores/nothing/entries",
    b"/v1/models",
    b"/v1/usage",
    b"/v1/realtime",
    b"/readyz",
    b"/",
    b"/page/../../etc/passwd",
    b"/v1/datastores/%00",
    b"/v1/datastores/" + b"a" * 3000,
    b"/v1/\xff\xfe",
    b"//v1//models",
    b"*",
    b"http://elsewhere/v1/models",
)
METHODS = (b"POST", b"GET", b"DELETE", b"PUT", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"G\tT")
VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/1.1.1", b"", b"HTCPCP/1.0")
HEADERS = (
    b"Content-Length: -1",
    b"Content-Length: 9999999999999999999999",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: five",
    b"Transfer-Encoding: chunked\r\nContent-Length: 4",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: gzip",
    b"Content-Encoding: br",
    b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=",
    b"Content-Type: multipart/form-data; boundary=x; boundary=y",
    b"Content-Type: application/json; charset=\xff",
    b"Authorization: Bearer \xff\x00",
    b"Authorization: " + b"k" * 9000,
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 99",
    b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Expect: 100-continue",
    b"Expect: tea",
    b"Range: bytes=0-0,1-1,-",
    b"Host: a\r\nHost: b",
    b"traceparent: 00-zz-zz-zz",
    b"X-Request-Id: \x01\x02",
    b": no name",
    b"no colon",
    b" folded",
)
BODIES = (
    b"",
    b"{",
    b"null",
    b'{"name": {"name": []}, "texts": 7}',
    b"[" * 3000,
    b'{"name": "\\ud800", "texts": ["\\u0000"]}',
    b'{"name": "a", "texts": [1e999]}',
    b"--x\r\n\r\n--x--",
    b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n',
    b"--x\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\nRIFF\r\n--x--\r\n",
    b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\xff\r\n--x--\r\n',
    b"\x00" * 5000,
    b"5\r\nabc\r\n0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"zz\r\n",
)
SECONDS = 3
"""How long an answer is waited for: part of the requests are never whole."""
REST_SECONDS = 0.2


def requests(count: int, seed: int = 0) -> Iterator[bytes]:
    """So many of them: most are HTTP, and wrong in what they say; the others are not even that."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _damaged(_request(draw), draw) if draw.random() < 0.2 else _request(draw)


def _request(draw: random.Random) -> bytes:
    body, kind = draw.choice(BODIES), draw.choice((b"application/json", b"multipart/form-data"))
    usual = draw.random() < 0.8
    method = draw.choice(METHODS[:5] if usual else METHODS)
    path = draw.choice(PATHS[:8] if usual else PATHS)
    version = VERSIONS[0] if usual else draw.choice(VERSIONS)
    lines = [b" ".join((method, path, version))]
    lines += [b"Host: here"] if draw.random() < 0.9 else []
    lines += [b"Content-Type: " + kind + b"; boundary=x"] if draw.random() < 0.6 else []
    lines += [b"Content-Length: %d" % len(body)] if usual else []
    lines += draw.sample(HEADERS, 1 if draw.random() < (0.2 if usual else 0.8) else 0)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _damaged(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                del changed[at : at + draw.randrange(1, 32)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randrange(1, 32))
            case 3:
                changed[at:at] = changed[at : at + draw.randrange(1, 64)]
        if len(changed) < 2:
            break
    return bytes(changed)


def exchange(host: str, port: int, data: bytes) -> bytes:
    """What is answered, as far as it comes at once; nothing where more of the request is waited
    for, and then the caller leaves. (A caller that closes its own half first is one that left.)"""
    with socket.create_connection((host, port), timeout=SECONDS) as connection:
        answer = b""
        with suppress(ConnectionError, TimeoutError):
            connection.sendall(data)
            while part := connection.recv(65_536):
                answer += part
                connection.settimeout(REST_SECONDS)
        return answer


def answered(host: str, port: int, sent: bytes) -> bool:
    """Whether anything is answered to what is sent; AssertionError where an answer blames the
    service or tells of its inside. It is for the caller to count those that get none."""
    answer = exchange(host, port, sent)
    if answer:
        check(answer, sent)
    return bool(answer)


def check(answer: bytes, sent: bytes) -> None:
    """An answer does not blame the service and tells nothing of its inside."""
    head = answer.split(b"\r\n", 1)[0].split()
    assert head[0].startswith(b"HTTP/1."), (sent, answer)
    assert int(head[1]) < 500 or int(head[1]) in (501, 505), (sent, answer)
    assert b"Traceback" not in answer, (sent, answer)
