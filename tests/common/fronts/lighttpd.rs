//! lighttpd: one process, all its files in the folder.

use std::process::Command;

use super::{Place, configuration, daemon};

pub(super) fn command(place: &Place<'_>) -> Command {
    let Place { folder, port, snippet } = place;
    let folder = folder.display();
    // Scripts are the test's own; the path of its directory is not to be in any other request.
    let root = if snippet.contains(".php") { folder.to_string() } else { "/srv".to_owned() };
    let text = format!(
        "server.document-root = \"{root}\"
         server.upload-dirs = (\"{folder}\")
         server.errorlog = \"{folder}/error.log\"
         server.breakagelog = \"{folder}/application.log\"
         server.max-keep-alive-requests = 10000
         server.bind = \"127.0.0.1\"
         server.port = {port}
         server.modules = ()\n{snippet}"
    );
    let mut command = daemon("lighttpd");
    command.args(["-D", "-f"]).arg(configuration(place, &text));
    command
}
