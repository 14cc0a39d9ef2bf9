// Answers with the method, the path, the query and the length of the body. Listens on the port in the first argument, or on
// descriptor 3.
const server = require('http').createServer((request, response) => {
  let length = 0;
  request.on('data', (chunk) => { length += chunk.length; });
  request.on('end', () => {
    const [path, query = ''] = request.url.split('?');
    response.end(`${request.method} ${path} ${query} ${length}\n`);
  });
});
const port = process.argv[2];
server.listen(port ? { port, host: '127.0.0.1' } : { fd: 3 });
process.on('SIGTERM', () => server.close(() => process.exit(0)));
