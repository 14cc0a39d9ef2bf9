// An HTTP application with the pages of examples/faulty.rs that the load of tests/common/gateway.rs requests.
const fs = require('fs');
const http = require('http');

const pages = {
  '/pid': () => `${process.pid}\n`,
  '/large': (query) => Buffer.alloc(Number(query), 'x'),
  // Counts the executions of a request: each one creates another file.
  '/once': (query) => {
    for (let count = 1; ; count++) {
      try {
        fs.closeSync(fs.openSync(`${process.env.FAULTY_DIR}/${query}.${count}`, 'wx'));
        return `${count}\n`;
      } catch (error) {
        if (error.code !== 'EEXIST') throw error;
      }
    }
  },
};

http.createServer((request, response) => {
  request.resume();
  request.on('end', () => {
    const [path, query] = request.url.split('?');
    const page = pages[path];
    if (page) response.end(page(query));
    else response.writeHead(404).end('no such page');
  });
}).listen({ fd: 3 });
