<?php
// Sends the file itself.
header('Content-Type: application/octet-stream');
header('Content-Length: ' . filesize(__DIR__ . '/data'));
readfile(__DIR__ . '/data');
