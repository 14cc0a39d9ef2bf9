# A Rack application: answers with the method, the path, the query and the length of the body.
run(lambda do |env|
  body = env['rack.input'].read || ''
  text = "#{env['REQUEST_METHOD']} #{env['PATH_INFO']} #{env['QUERY_STRING']} #{body.bytesize}\n"
  [200, { 'content-type' => 'text/plain', 'content-length' => text.bytesize.to_s }, [text]]
end)
