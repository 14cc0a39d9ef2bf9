//! Real programs behind gateways, as in `docs/run-anything.md`: each serves GET and POST, survives a reload under load
//! without a failure, and leaves no process behind. `scripts/test` installs the programs.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::process::Command;

use common::Server;
use common::http::get;
use common::limit::InTime as _;
use common::recipes::{Recipe, stops, survives_reload};

const HTTP: [&str; 2] = ["--backend", "http"];
/// For servers that serve one request at a time.
const HTTP_ALONE: [&str; 4] = ["--backend", "http", "--app-concurrency", "1"];
const SCGI: [&str; 2] = ["--backend", "scgi"];

fn python(name: &str, options: &[&str], arguments: &[&str]) {
    let recipe = Recipe::new(&["wsgi.py", "asgi.py", "flask_app.py", "flup_app.py"]);
    recipe.serves(options, &[&["python3", "-m", name], arguments].concat());
}

// ---- HTTP ----

#[test]
fn uvicorn() {
    python("uvicorn", &HTTP, &["--fd", "{fd}", "asgi:app"]);
}

#[test]
fn hypercorn() {
    python("hypercorn", &HTTP, &["--bind", "fd://{fd}", "asgi:app"]);
}

#[test]
fn gunicorn_with_sync_workers() {
    python("gunicorn", &HTTP_ALONE, &["-w", "1", "wsgi:app"]);
}

#[test]
fn gunicorn_with_threads() {
    python("gunicorn", &HTTP, &["-w", "1", "-k", "gthread", "--threads", "8", "wsgi:app"]);
}

#[test]
fn waitress() {
    python("waitress", &HTTP, &["--unix-socket={socket}", "wsgi:app"]);
}

#[test]
fn flask_under_gunicorn() {
    python("gunicorn", &HTTP_ALONE, &["-w", "1", "flask_app:app"]);
}

#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn django_under_gunicorn() {
    let recipe = Recipe::new(&["django_app.py"]);
    recipe.serves(&HTTP_ALONE, &["python3", "-m", "gunicorn", "-w", "1", "django_app:app"]);
}

#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn granian() {
    python("granian", &HTTP, &["--interface", "asgi", "--uds", "{socket}", "asgi:app"]);
}

#[test]
fn node_on_descriptor_3() {
    Recipe::new(&["http.js"]).serves(&HTTP, &["node", "http.js"]);
}

#[test]
fn node_on_a_port() {
    Recipe::new(&["http.js"]).serves(&HTTP, &["node", "http.js", "{port}"]);
}

#[test]
fn express() {
    Recipe::new(&["express.js"]).serves(&HTTP, &["node", "express.js"]);
}

#[test]
fn puma() {
    Recipe::new(&["config.ru"]).serves(&HTTP, &["puma", "--bind", "unix://{socket}", "config.ru"]);
}

#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn starman() {
    Recipe::new(&["app.psgi"]).serves(&HTTP_ALONE, &["starman", "--workers", "1", "--listen", "{socket}", "app.psgi"]);
}

// ---- FastCGI ----

#[test]
fn php_with_a_front_controller() {
    let recipe = Recipe::new(&["index.php"]);
    let root = recipe.path("").to_string_lossy().into_owned();
    recipe.serves(&["--root", &root, "--index", "index.php"], &["php-cgi"]);
}

#[test]
fn perl_with_fcgi() {
    Recipe::new(&["fcgi.pl"]).serves(&[], &["perl", "fcgi.pl"]);
}

#[test]
fn c_with_libfcgi() {
    let recipe = Recipe::new(&["echo.c"]);
    let mut cc = Command::new("cc");
    let output = cc.args(["-o", "echo", "echo.c", "-lfcgi"]).current_dir(recipe.path("")).output_in_time().unwrap();
    assert!(output.status.success(), "{output:?}");
    recipe.serves(&[], &["./echo"]);
}

// ---- SCGI ----

#[test]
fn perl_with_scgi() {
    Recipe::new(&["scgi.pl"]).serves(&SCGI, &["perl", "scgi.pl"]);
}

#[test]
fn python_with_flup() {
    let options = [&SCGI[..], &["--app-concurrency", "8"]].concat();
    Recipe::new(&["wsgi.py", "flup_app.py"]).serves(&options, &["python3", "flup_app.py", "{port}"]);
}

// ---- CGI ----

#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn mapserver() {
    let recipe = Recipe::new(&["world.map", "mapserver.conf"]);
    let mut command = recipe.command(&["--backend", "cgi"], &["/usr/lib/cgi-bin/mapserv"]);
    command.env("MAPSERVER_CONFIG_FILE", recipe.path("mapserver.conf")).env("MS_MAPFILE", recipe.path("world.map"));
    let mut server = Server::start_command(&mut command);
    let target = "/?SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=square&STYLES=&CRS=EPSG:4326&BBOX=0,0,10,10\
                  &WIDTH=64&HEIGHT=64&FORMAT=image/png";
    let map = |address: &str, _| {
        let response = get(address, target).map_err(|error| error.to_string())?;
        if response.body.starts_with(b"\x89PNG") { Ok(()) } else { Err(response.text()) }
    };
    survives_reload(&mut server, map);
    stops(&mut server);
}

#[test]
fn a_shell_script() {
    Recipe::new(&["echo.cgi"]).serves(&["--backend", "cgi"], &["./echo.cgi"]);
}
