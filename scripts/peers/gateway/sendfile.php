<?php
// Leaves the file to the server in front: nginx, or a gateway with --sendfile.
header('Content-Type: application/octet-stream');
header('X-Accel-Redirect: /files/data');
