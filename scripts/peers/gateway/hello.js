// Listens on descriptor 3, or on the Unix socket that its argument names.
const http = require('http');
const body = 'Hello, world\n';
const server = http.createServer((request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/plain', 'Content-Length': body.length });
  response.end(body);
});
const path = process.argv[2];
server.listen(path ? { path, backlog: 1024 } : { fd: 3 });
process.on('SIGTERM', () => process.exit(0));
