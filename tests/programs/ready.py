"""A server for the tests of readiness, with a thread for each connection. It waits in select(2), where it cannot be observed.

ready.py PROTOCOL DIRECTORY: PROTOCOL is http (descriptor 3), scgi or fastcgi (descriptor 0). The file DIRECTORY/scene
selects what happens at startup, and DIRECTORY/status is the status of /ready.

SIGUSR1 lets it finish its requests and exit. Other signals have their default effect.
"""

import os
import select
import signal
import socket
import sys
import threading
import time

protocol, directory = sys.argv[1:3]


def read(name, default):
    try:
        with open(os.path.join(directory, name)) as file:
            return file.read().strip()
    except FileNotFoundError:
        return default


def write(name, text=""):
    with open(os.path.join(directory, name), "a") as file:
        file.write(text)


def exactly(connection, count):
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def http(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(4096)
        if not more:
            raise EOFError
        data += more
    status, body = answer(data.split(b" ")[1].decode())
    head = f"HTTP/1.1 {status} Status\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    connection.sendall(head.encode() + body)


def cgi(path):
    status, body = answer(path)
    return f"Status: {status} Status\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def scgi(connection):
    length = b""
    while not length.endswith(b":"):
        length += exactly(connection, 1)
    strings = exactly(connection, int(length[:-1]) + 1).split(b"\0")
    variables = dict(zip(strings[::2], strings[1::2]))
    connection.sendall(cgi(variables[b"REQUEST_URI"].decode()))


def pairs(data):
    while data:
        lengths = []
        for _ in range(2):
            size = 4 if data[0] >= 128 else 1
            lengths.append(int.from_bytes(data[:size], "big") & 0x7FFFFFFF)
            data = data[size:]
        name, value = data[: lengths[0]], data[lengths[0] : sum(lengths)]
        data = data[sum(lengths) :]
        yield name, value


def fastcgi(connection):
    params, request = b"", b"\0\1"
    while True:
        _, kind, high, low, first, second, padding, _ = exactly(connection, 8)
        content = exactly(connection, first * 256 + second + padding)[: first * 256 + second]
        request = bytes([high, low])
        params += content if kind == 4 else b""
        if kind == 5 and not content:
            break
    output = cgi(dict(pairs(params))[b"REQUEST_URI"].decode())
    record = lambda kind, content: bytes([1, kind]) + request + len(content).to_bytes(2, "big") + b"\0\0" + content
    connection.sendall(record(6, output) + record(6, b"") + record(3, bytes(8)))


def answer(path):
    if path.startswith("/ready"):
        write("asked", "x")
        return read("status", "200"), b"ready\n"
    if path.startswith("/slow"):
        time.sleep(0.05)
    return "200", f"{os.getpid()}\n".encode()


def serve(connection):
    with connection:
        try:
            {"http": http, "scgi": scgi, "fastcgi": fastcgi}[protocol](connection)
        except (EOFError, ConnectionError):
            pass


def die():
    print("loading the configuration")
    print("schema version mismatch", flush=True)
    os._exit(29)


scene = read("scene", "")
if scene == "database":
    database = socket.socket(socket.AF_UNIX)
    database.connect(os.path.join(directory, "database"))
    time.sleep(2)
    die()
elif scene == "dies":
    time.sleep(2)
    die()
elif scene == "slow":
    write("importing")
    while not os.path.exists(os.path.join(directory, "go")):
        time.sleep(0.01)
elif scene == "closes":
    os.close(int(os.environ["FORKYARD_READY"]))

leaving = threading.Event()
wakes, woken = socket.socketpair()
woken.setblocking(False)
signal.set_wakeup_fd(woken.fileno())


def leave(*_):
    leaving.set()
    print("received USR1", flush=True)


signal.signal(signal.SIGUSR1, leave)
listener = socket.socket(fileno=3 if protocol == "http" else 0)
listener.setblocking(False)
if "FORKYARD_READY" in os.environ and scene != "closes":
    os.write(int(os.environ["FORKYARD_READY"]), b"\n")
    os.write(int(os.environ["FORKYARD_READY"]), b"\n")
if scene == "brief":
    threading.Timer(0.3, die).start()
threads = []
while not leaving.is_set():
    if listener not in select.select([listener, wakes], [], [])[0]:
        continue
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        continue
    connection.setblocking(True)
    threads.append(threading.Thread(target=serve, args=(connection,)))
    threads[-1].start()
for thread in threads:
    thread.join()
