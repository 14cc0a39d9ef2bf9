<?php
// A chat in PHP. The gateways hold the connections of all visitors, so two PHP processes serve any number of them.
// Start it in the directory of the repository, and open http://127.0.0.1:8080/ in two windows:
//
//     forkyard run --bind http:127.0.0.1:8080 --workers 2 --events 1M \
//         --root examples/chat --index index.php -- php-cgi
//
// GET  /                    asks for a name and a room
// GET  /rooms/ROOM          the page of a room
// GET  /rooms/ROOM/events   checks the visitor, and hands the connection over to the event stream of the room
// POST /rooms/ROOM          publishes a message

declare(strict_types=1);

function fail(int $status, string $text): never
{
    http_response_code($status);
    header('Content-Type: text/plain');
    exit("$text\n");
}

function publish(string $topic, string $data): void
{
    $events = stream_socket_client('udg://' . getenv('FORKYARD_EVENTS'));
    stream_set_blocking($events, false);
    // A datagram is the topic, the name of the event (here empty) and its data.
    if (@stream_socket_sendto($events, "$topic\n\n$data") < 1) {
        fail(503, 'The message could not be published.');
    }
}

function is_name(string $text): bool
{
    return preg_match('/^[\p{L}\p{N} ._-]{1,30}$/Du', $text) === 1;
}

function html(string $text): string
{
    return htmlspecialchars($text, ENT_QUOTES | ENT_SUBSTITUTE);
}

$method = $_SERVER['REQUEST_METHOD'];
$path = rawurldecode((string) parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH));
$cookie = $_COOKIE['name'] ?? null;
$name = is_string($cookie) && is_name($cookie) ? $cookie : '';

if ($path === '/' && $method === 'POST') {
    ['name' => $wanted, 'room' => $room] = $_POST + ['name' => '', 'room' => ''];
    $is_text = is_string($wanted) && is_string($room);
    if (!$is_text || !is_name($wanted) || preg_match('/^[a-z0-9-]{1,30}$/D', $room) !== 1) {
        fail(400, 'A name consists of letters and digits; a room of lower-case letters, digits and hyphens.');
    }
    setcookie('name', $wanted, ['httponly' => true, 'samesite' => 'Lax', 'path' => '/']);
    header("Location: /rooms/$room", true, 303);
    exit;
}
if ($path === '/') {
    echo <<<HTML
        <!doctype html>
        <html lang="en">
        <meta charset="utf-8">
        <title>Chat</title>
        <h1>Chat</h1>
        <form method="post">
          <label>Name <input name="name" required maxlength="30"></label>
          <label>Room <input name="room" required value="lobby" pattern="[a-z0-9\\-]{1,30}"></label>
          <button>Enter</button>
        </form>

        HTML;
    exit;
}
if (preg_match('#^/rooms/([a-z0-9-]{1,30})(/events)?$#D', $path, $match) !== 1) {
    fail(404, 'There is no such page.');
}
[, $room] = $match;
if ($name === '') {
    fail(403, 'Choose a name on the first page.');
}
if (isset($match[2])) {
    // The body of this response is not sent. The visitor receives the events of the topic instead.
    header('X-Forkyard-Subscribe: ' . rawurlencode("room-$room"));
    exit;
}
if ($method === 'POST') {
    $text = trim((string) file_get_contents('php://input'));
    if ($text === '' || strlen($text) > 2000 || !preg_match('//u', $text)) {
        fail(400, 'A message has 1 to 2000 bytes.');
    }
    publish("room-$room", json_encode(['name' => $name, 'text' => $text], JSON_THROW_ON_ERROR));
    http_response_code(204);
    exit;
}
$title = html("$room: $name");
echo <<<HTML
    <!doctype html>
    <html lang="en">
    <meta charset="utf-8">
    <title>{$title}</title>
    <style>
      body { font: 16px/1.4 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem; }
      b { margin-right: .5em; }
      li { list-style: none; }
      form { display: flex; gap: .5rem; }
      input { flex: 1; }
    </style>
    <h1>{$title}</h1>
    <p id="state">connecting</p>
    <ul id="messages"></ul>
    <form><input autocomplete="off" maxlength="500" autofocus><button>Send</button></form>
    <script>
    "use strict";
    const state = document.getElementById("state"), input = document.querySelector("input");
    function line(name, text) {
      const item = document.createElement("li"), author = document.createElement("b");
      author.textContent = name;
      item.append(author, text);
      document.getElementById("messages").append(item);
    }
    function listen() {
      const source = new EventSource(location.pathname + "/events");
      source.onopen = () => state.textContent = "connected";
      source.onmessage = event => { const { name, text } = JSON.parse(event.data); line(name, text); };
      source.addEventListener("gap", () => line("", "Some messages were missed."));
      source.onerror = () => {
        state.textContent = "connecting again";
        // EventSource gives up after an error response, for example if the server is full.
        if (source.readyState === EventSource.CLOSED) setTimeout(listen, 1000 + 2000 * Math.random());
      };
    }
    document.querySelector("form").onsubmit = async event => {
      event.preventDefault();
      const sent = await fetch(location.pathname, { method: "POST", body: input.value });
      if (sent.ok) input.value = ""; else line("", await sent.text());
    };
    listen();
    </script>

    HTML;
