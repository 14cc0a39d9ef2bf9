// An HTTP application that hands its clients over to event streams, for tests. It listens on descriptor 3.
const http = require('http');

let closed = 0; // number of endless responses whose connection was closed

http.createServer((request, response) => {
  const url = new URL(request.url, 'http://localhost');
  request.resume();
  switch (url.pathname) {
    case '/subscribe':
      response.setHeader('X-Forkyard-Subscribe', encodeURIComponent(url.searchParams.get('topic')));
      response.setHeader('Set-Cookie', ['a=1', 'b=2']);
      response.end('this text is not sent');
      break;
    case '/endless': {
      response.setHeader('X-Forkyard-Subscribe', 'a');
      const timer = setInterval(() => response.write('this text is not sent'), 1);
      response.on('close', () => { clearInterval(timer); closed += 1; });
      break;
    }
    case '/closed':
      response.end(String(closed));
      break;
    default:
      response.writeHead(404).end();
  }
}).listen({ fd: 3 });
process.on('SIGTERM', () => process.exit(0));
