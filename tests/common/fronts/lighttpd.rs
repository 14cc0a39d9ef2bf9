//! Configures lighttpd with one process. All its files are in the site's directory.

use std::process::Command;

use super::{Place, configuration, daemon};

pub(super) fn command(place: &Place<'_>) -> Command {
    let Place { directory, port, snippet } = place;
    let directory = directory.display();
    // Only the test's scripts need this directory as the document root. Other requests must not contain its path.
    let root = if snippet.contains(".php") { directory.to_string() } else { "/srv".to_owned() };
    let text = format!(
        "server.document-root = \"{root}\"
         server.upload-dirs = (\"{directory}\")
         server.errorlog = \"{directory}/error.log\"
         server.breakagelog = \"{directory}/application.log\"
         server.max-keep-alive-requests = 10000
         server.bind = \"127.0.0.1\"
         server.port = {port}
         server.modules = ()\n{snippet}"
    );
    let mut command = daemon("lighttpd");
    command.args(["-D", "-f"]).arg(configuration(place, &text));
    command
}
