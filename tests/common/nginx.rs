//! nginx in front of a server with gateways.

use std::process::Command;

use super::gateway::Site;
use super::{Helper, free_port, wait_until};

/// Starts nginx in front of the FastCGI address of a site.
pub fn start_nginx(site: &Site) -> (Helper, String) {
    let bind = site.server.binds.iter().find_map(|bind| bind.strip_prefix("fastcgi:")).unwrap();
    let directory = site.place.text("");
    let temporary: String = ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"]
        .map(|name| format!("{name}_temp_path {directory}/nginx-{name};\n"))
        .concat();
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let port = free_port();
    let text = format!(
        "daemon off; {user} worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
         events {{ worker_connections 256; }}
         http {{ access_log off; client_max_body_size 32m;\n{temporary}
           server {{ listen 127.0.0.1:{port}; location / {{
             include /etc/nginx/fastcgi_params; fastcgi_pass {bind};
             fastcgi_param SCRIPT_FILENAME {directory}/index.php; fastcgi_param SCRIPT_NAME /index.php;
             fastcgi_param PATH_INFO $uri;
         }} }} }}\n"
    );
    std::fs::write(site.path("nginx.conf"), text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&directory).arg("-e").arg(site.path("error.log")).arg("-c").arg(site.path("nginx.conf"));
    let mut nginx = Helper::start(&mut command);
    let address = format!("127.0.0.1:{port}");
    wait_until("nginx listens", || {
        assert_eq!(nginx.0.try_wait().unwrap(), None, "{:?}", std::fs::read_to_string(site.path("error.log")));
        super::connect_tcp(&address).ok()
    });
    (nginx, address)
}
