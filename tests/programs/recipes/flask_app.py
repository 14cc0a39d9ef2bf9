"""A Flask application: answers with the method, the path, the query and the length of the body."""
from flask import Flask, Response, request

app = Flask(__name__)


@app.route("/", defaults={"path": ""}, methods=["GET", "POST"])
@app.route("/<path:path>", methods=["GET", "POST"])
def echo(path):
    query = request.query_string.decode()
    return Response(f"{request.method} /{path} {query} {len(request.get_data())}\n", mimetype="text/plain")
