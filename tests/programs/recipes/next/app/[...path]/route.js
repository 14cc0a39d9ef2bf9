// Answers with the method, the path, the query and the length of the body.
export const dynamic = 'force-dynamic';

async function answer(request) {
  const { pathname, searchParams } = new URL(request.url);
  const { byteLength } = await request.arrayBuffer();
  return new Response(`${request.method} ${pathname} ${searchParams} ${byteLength}\n`);
}

export { answer as GET, answer as POST };
