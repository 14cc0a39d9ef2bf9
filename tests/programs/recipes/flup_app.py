"""Serves the WSGI application over SCGI, with flup, on the port in the first argument."""
import sys

from flup.server.scgi import WSGIServer
from wsgi import app

WSGIServer(app, bindAddress=("127.0.0.1", int(sys.argv[1])), scriptName="").run()
