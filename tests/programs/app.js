// An HTTP application for tests. It listens on descriptor 3, or on the port or path in its first argument.
const fs = require('fs');
const http = require('http');

let stream; // the open event stream
let waiting = 0; // number of requests that have no response
let left = 0; // number of clients that left before their response
let streamsLeft = 0; // number of clients that left their event stream

const pages = {
  '/echo': (request, response, body) =>
    response.end(JSON.stringify({ method: request.method, url: request.url, headers: request.headers, length: body.length,
      listen: process.env.LISTEN_FDS, own: process.env.LISTEN_PID === String(process.pid) })),
  '/chunks': (request, response) => { response.write('a'); setImmediate(() => response.end('b')); },
  '/trailers': (request, response) => {
    response.writeHead(200, { trailer: 'X-Sum', 'x-te': request.headers.te ?? 'none' });
    response.write('a');
    response.addTrailers({ 'X-Sum': '97', 'Keep-Alive': '1' });
    response.end();
  },
  '/large': (request, response) => response.end(Buffer.alloc(10 << 20, 'x')),
  '/half': (request, response) => {
    response.writeHead(200, { 'content-length': 200000 });
    response.write(Buffer.alloc(100000), () => response.destroy());
  },
  '/half-chunks': (request, response) => response.write(Buffer.alloc(100000), () => response.destroy()),
  '/events': (request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' });
    response.write('data: first\n\n');
    stream = response;
    response.on('close', () => { streamsLeft += 1; });
  },
  '/next': (request, response) => { stream.write('data: second\n\n'); response.end('ok'); },
  '/wait': (request, response) => { waiting += 1; response.on('close', () => { left += 1; }); },
  '/waiting': (request, response) => response.end(String(waiting)),
  '/left': (request, response) => response.end(String(left)),
  '/streams-left': (request, response) => response.end(String(streamsLeft)),
  '/block': () => { for (;;); },
  '/kill': () => process.kill(process.pid, 'SIGKILL'),
  '/garbage': (request) => { request.socket.end('this is not HTTP\r\n\r\n'); },
  '/close': (request) => { request.socket.destroy(); },
  '/early': (request, response) => { response.writeEarlyHints({ link: '</a.css>; rel=preload' }); response.end('late'); },
  // Each id must be executed once.
  '/once': (request, response) => {
    const id = request.url.split('?')[1];
    try {
      fs.closeSync(fs.openSync(`ids/${id}`, 'wx'));
      response.end('once');
    } catch {
      fs.closeSync(fs.openSync(`twice/${id}`, 'w'));
      response.end('twice');
    }
  },
};

const server = http.createServer((request, response) => {
  const chunks = [];
  request.on('data', (chunk) => chunks.push(chunk));
  request.on('end', () => {
    response.setHeader('x-pid', process.pid);
    const page = pages[request.url.split('?')[0]];
    if (page) page(request, response, Buffer.concat(chunks));
    else response.writeHead(404).end('no such page');
  });
});
server.on('upgrade', (request, socket) => {
  socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n');
  socket.on('data', (bytes) => (String(bytes).includes('bye') ? socket.end('bye') : socket.write(bytes)));
});
const where = process.argv[2];
if (where === undefined) server.listen({ fd: 3 });
else if (/^\d+$/.test(where)) server.listen(Number(where), '127.0.0.1');
else server.listen(where);
process.on('SIGTERM', () => process.exit(0));
