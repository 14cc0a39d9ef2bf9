// An Express application: answers with the method, the path, the query and the length of the body.
const express = require('express');

const app = express();
app.use(express.raw({ type: () => true, limit: '10mb' }));
app.use((request, response) => {
  const query = request.url.split('?')[1] || '';
  const length = Buffer.isBuffer(request.body) ? request.body.length : 0;
  response.type('text/plain').send(`${request.method} ${request.path} ${query} ${length}\n`);
});
const server = app.listen({ fd: 3 });
process.on('SIGTERM', () => server.close(() => process.exit(0)));
