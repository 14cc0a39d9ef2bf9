"""A WSGI application on wsgiref, which listens on descriptor 3. It serves one request at a time, and closes the connection after each
response. Without a length, the end of the connection is the end of the response."""

import os
import signal
import socket
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer


class Handler(WSGIRequestHandler):
    def address_string(self):
        return "gateway"

    def log_message(self, *_):
        pass


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Pid", str(os.getpid()))])
    if environ["PATH_INFO"] == "/die":
        yield b"x" * 100_000
        os.kill(os.getpid(), signal.SIGKILL)
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    yield f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {len(body)} {environ['HTTP_X_FORWARDED_FOR']}\n".encode()
    yield b"end\n"


assert os.environ["LISTEN_PID"] == str(os.getpid()) and os.environ["LISTEN_FDS"] == "1"
server = WSGIServer(("", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=3)
server.server_name, server.server_port = "test", 80
server.setup_environ()
server.get_request = lambda: (server.socket.accept()[0], ("gateway", 0))
server.set_app(app)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
server.serve_forever()
