//! Configures Apache httpd with the event MPM. All its files are in the site's directory. If httpd is started by root, its children run as
//! Debian's www-data, because httpd refuses to serve as root.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::{Place, configuration, daemon, is_root};

const MODULES: [&str; 9] =
    ["mpm_event", "authz_core", "alias", "proxy", "proxy_fcgi", "proxy_http", "proxy_scgi", "cgid", "fcgid"];

pub(super) fn command(place: &Place<'_>) -> Command {
    let Place { directory, port, snippet } = place;
    // The child processes do not always run as the same user, so any user may create sockets in this directory.
    let sockets = directory.join("fcgid");
    let _ = fs::create_dir(&sockets); // already exists from the second attempt on
    fs::set_permissions(&sockets, Permissions::from_mode(0o777)).unwrap();
    let directory = directory.display();
    let modules: String = MODULES
        .iter()
        .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"))
        .collect();
    let user = if is_root() { "User www-data\nGroup www-data\n" } else { "" };
    let text = format!(
        "ServerRoot \"{directory}\"\nServerName localhost\nServerAdmin webmaster@localhost\nDocumentRoot \"/srv\"\n\
         Listen 127.0.0.1:{port}\nPidFile \"{directory}/httpd.pid\"\nErrorLog \"{directory}/error.log\"\n\
         DefaultRuntimeDir \"{directory}\"\nMaxKeepAliveRequests 0\n\
         StartServers 1\nServerLimit 1\nThreadsPerChild 32\nMaxRequestWorkers 32\nMinSpareThreads 1\nMaxSpareThreads 32\n\
         {modules}{user}\
         ScriptSock \"{directory}/cgid.sock\"\n\
         FcgidIPCDir \"{directory}/fcgid\"\nFcgidProcessTableFile \"{directory}/fcgid_shm\"\n{snippet}\n"
    );
    let mut command = daemon("apache2");
    command.args(["-D", "FOREGROUND", "-f"]).arg(configuration(place, &text));
    command
}
