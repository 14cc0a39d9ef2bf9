//! A real web server in front, with whatever configuration a test writes for it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Helper, free_port, wait_until};

/// Starts `nginx` or `lighttpd` in `folder`. `config` writes the configuration for a port. Returns the server and its
/// address.
pub fn start(name: &str, folder: &Path, config: impl Fn(u16) -> String) -> (Helper, String) {
    // The port was free when we looked. If it is not any more, the web server ends, and there are others.
    for _ in 0..5 {
        let port = free_port();
        let file = folder.join("front.conf");
        std::fs::write(&file, config(port)).unwrap();
        let mut command = Command::new(daemon(name));
        if name == "nginx" {
            command.arg("-p").arg(folder).arg("-e").arg(folder.join("error.log")).arg("-c").arg(file);
        } else {
            command.args(["-D", "-f"]).arg(file);
        }
        let log = File::create(folder.join("front.log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut helper = Helper::start(&mut command);
        let up = wait_until("the web server listens, or has ended", || {
            let ended = helper.0.try_wait().expect("it is our child").is_some();
            let listens = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
            (ended || listens).then_some(!ended)
        });
        if up {
            return (helper, format!("127.0.0.1:{port}"));
        }
    }
    panic!("{name} does not start: {}", std::fs::read_to_string(folder.join("front.log")).unwrap_or_default());
}

/// The path of a daemon. Those are in folders that not every user has in PATH.
fn daemon(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not installed (scripts/test installs it)"))
}

/// nginx with one server, whose `location /` is given.
pub fn nginx_config(folder: &Path, port: u16, location: &str) -> String {
    let folder = folder.display();
    // The folder is its owner's alone, so the worker must be the owner. Only root is asked who that is.
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let temp: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {folder}/nginx-{name};\n"))
        .concat();
    format!(
        "daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
         events {{ worker_connections 256; }}
         http {{ access_log off; client_max_body_size 64m; {temp}
         server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }} }}\n"
    )
}

/// lighttpd with one server, and what else is given.
pub fn lighttpd_config(folder: &Path, port: u16, rest: &str) -> String {
    let folder = folder.display();
    format!(
        "server.document-root = \"{folder}\"
         server.upload-dirs = (\"{folder}\")
         server.errorlog = \"{folder}/error.log\"
         server.bind = \"127.0.0.1\"
         server.port = {port}
         {rest}\n"
    )
}
