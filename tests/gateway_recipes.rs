//! Real programs behind gateways, as in `docs/run-anything.md`: each serves GET and POST, survives a reload under load
//! without a failure, and leaves no process behind. `scripts/test` installs the programs.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Command;

use common::Server;
use common::http::{Client, Response, get};
use common::limit::InTime as _;
use common::recipes::{Recipe, packages, page, serves_page, stops, survives_reload};

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

/// `scripts/recipes` has built the application.
#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn next() {
    let app = packages().join("next");
    let (program, app) = (app.join("node_modules/.bin/next"), app.to_string_lossy().into_owned());
    let command = [program.to_str().unwrap(), "start", &app, "--hostname", "127.0.0.1", "--port", "{port}"];
    Recipe::new(&[]).serves(&HTTP, &command);
}

#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn go() {
    let recipe = Recipe::new(&["app.go"]);
    let mut build = Command::new("go");
    build.args(["build", "-o", "app", "app.go"]).env("GOCACHE", recipe.path("cache")).current_dir(recipe.path(""));
    let output = build.output_in_time().unwrap();
    assert!(output.status.success(), "{output:?}");
    recipe.serves(&HTTP, &["./app"]);
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

/// A client of a wiki, with the cookies that it has received.
struct Visitor<'a> {
    server: &'a Server,
    cookies: BTreeMap<String, String>,
}

impl Visitor<'_> {
    /// Sends a GET, or a POST if there is a form.
    fn visit(&mut self, target: &str, form: Option<&str>) -> Response {
        let cookies: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let (method, form) = if let Some(form) = form { ("POST", form) } else { ("GET", "") };
        let mut client = Client::connect(&self.server.http()).unwrap();
        write!(
            client.stream.get_mut(),
            "{method} {target} HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\nContent-Length: {}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\n\r\n{form}",
            self.server.http(),
            cookies.join("; "),
            form.len()
        )
        .unwrap();
        let response = client.response(false).unwrap();
        for (name, value) in &response.headers {
            let cookie = value.split(';').next().and_then(|cookie| cookie.split_once('='));
            if let Some((cookie, value)) = cookie.filter(|_| name.eq_ignore_ascii_case("set-cookie")) {
                self.cookies.insert(cookie.to_owned(), value.to_owned());
            }
        }
        response
    }

    /// Returns the value of a field of the form on this page.
    fn field(&mut self, target: &str, name: &str) -> String {
        let page = self.visit(target, None).text();
        let field = page.split_once(&format!("name=\"{name}\" value=\"")).and_then(|(_, rest)| rest.split_once('"'));
        field.unwrap_or_else(|| panic!("{target} has no field {name}: {page}")).0.to_owned()
    }
}

/// DokuWiki of Debian: pages, style sheets, static files behind links, a login, and an edit.
#[test]
#[ignore = "scripts/recipes installs and runs it"]
fn dokuwiki() {
    let wiki = packages().join("dokuwiki");
    let place = |path: &str| wiki.join(path).canonicalize().unwrap().to_string_lossy().into_owned();
    let (root, library) = (place("www"), place("var/lib/dokuwiki/lib"));
    let files = [format!("/={root}"), format!("/lib/tpl={library}/tpl"), format!("/lib/plugins={library}/plugins")];
    let mut options = vec!["--workers", "2", "--root", &root, "--index", "doku.php"];
    files.iter().for_each(|files| options.extend(["--static", files]));
    let mut server = Server::start_command(&mut Recipe::new(&[]).command(&options, &["php-cgi"]));

    let mut visitor = Visitor { server: &server, cookies: BTreeMap::new() };
    let kinds = [
        ("/doku.php", "text/html; charset=utf-8"),
        ("/lib/exe/css.php?t=dokuwiki", "text/css; charset=utf-8"),
        ("/lib/exe/js.php?t=dokuwiki", "application/javascript; charset=utf-8"),
        ("/lib/tpl/dokuwiki/images/logo.png", "image/png"),
    ];
    for (target, kind) in kinds {
        let response = visitor.visit(target, None);
        assert_eq!((response.status, response.header("content-type")), (200, Some(kind)), "{target}");
    }
    let response = visitor.visit("/doku.php", Some("id=start&do=login&u=admin&p=wrong"));
    assert!(response.status != 302 && !response.text().contains("Logged in as"), "{}", response.text());
    let response = visitor.visit("/doku.php", Some("id=start&do=login&u=admin&p=secret"));
    assert_eq!(response.status, 302, "{}", response.text());

    let page = format!("/doku.php?id=test-{}", std::process::id());
    let token = visitor.field(&format!("{page}&do=edit"), "sectok");
    let form = format!("sectok={token}&do[save]=1&date=&rev=0&prefix=.&suffix=&wikitext=It+is+**saved**.");
    let response = visitor.visit(&page, Some(&form));
    assert_eq!(response.status, 302, "{}", response.text());
    let text = visitor.visit(&page, None).text();
    assert!(text.contains("It is <strong>saved</strong>.") && text.contains("Logged in as"), "{text}");

    // A page that has not just been saved: DokuWiki renders a new page several times and writes its cache in place, so
    // requests at the same time can find an empty page.
    let read = |address: &str, _| {
        let response = get(address, "/doku.php?id=wiki:syntax").map_err(|error| error.to_string())?;
        if response.text().contains("<h1 class=\"sectionedit1\"") { Ok(()) } else { Err(response.text()) }
    };
    read(&server.http(), 0).unwrap();
    survives_reload(&mut server, read);
    stops(&mut server);
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
#[ignore = "scripts/recipes installs and runs it"]
fn gitweb() {
    let recipe = Recipe::new(&[]);
    recipe.commit("one", "the first commit");
    std::fs::write(recipe.path("gitweb.conf"), format!("$projectroot = '{}';\n", recipe.path("").display())).unwrap();
    let mut command = recipe.command(&["--backend", "cgi"], &["/usr/share/gitweb/gitweb.cgi"]);
    let mut server = Server::start_command(command.env("GITWEB_CONFIG", recipe.path("gitweb.conf")));
    assert!(page(&server, "/").text().contains("one/.git"));
    serves_page(&mut server, "/?p=one/.git;a=log", "the first commit");
}

#[test]
fn a_shell_script() {
    Recipe::new(&["echo.cgi"]).serves(&["--backend", "cgi"], &["./echo.cgi"]);
}
