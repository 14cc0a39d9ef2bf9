//! Configures nginx with one worker. All its files are in the site's directory.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::{Place, configuration, daemon, is_root};

pub(super) fn command(place: &Place<'_>) -> Command {
    let Place { directory, snippet, .. } = place;
    // The snippet includes these files from the directory of the configuration, as in /etc/nginx. They already exist from the second
    // attempt on.
    for name in ["fastcgi_params", "scgi_params"] {
        let _ = symlink(Path::new("/etc/nginx").join(name), directory.join(name));
    }
    let user = if is_root() { "user root;" } else { "" };
    let temporary: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {}/nginx-{name};\n", directory.display()))
        .concat();
    let directory = directory.display();
    let text = format!(
        "daemon off; {user} worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
         events {{ worker_connections 256; }}
         http {{ access_log off; root /srv; keepalive_requests 10000;\n{temporary}\n{snippet}\n}}\n"
    );
    let mut command = daemon("nginx");
    command.arg("-p").arg(place.directory).arg("-e").arg(place.directory.join("error.log"));
    command.arg("-c").arg(configuration(place, &text));
    command
}
