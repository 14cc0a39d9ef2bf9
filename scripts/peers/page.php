<?php
// A page of 16 KiB from APCu, the cache that the children of a php-fpm pool share.
$page = apcu_fetch('page');
if ($page === false) {
    $page = '';
    for ($i = 0; strlen($page) < 16384; $i++) {
        $page .= sprintf("line %05d of a page that took some work to make, kept in a cache\n", $i);
    }
    $page = substr($page, 0, 16384);
    apcu_store('page', $page);
}
header('Content-Type: text/plain');
echo $page;
