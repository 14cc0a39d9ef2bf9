<?php
// Reads the body of the request. With ?md5, prints its checksum; otherwise, its length.
$input = fopen('php://input', 'rb');
$hash = isset($_GET['md5']) ? hash_init('md5') : null;
$length = 0;
while (!feof($input)) {
    $part = fread($input, 65536);
    $length += strlen($part);
    if ($hash) {
        hash_update($hash, $part);
    }
}
header('Content-Type: text/plain');
echo $hash ? hash_final($hash) : $length, "\n";
