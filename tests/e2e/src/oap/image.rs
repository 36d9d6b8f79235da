//! OAP and the Java agent as a container image.

use std::path::Path;

use anyhow::{Context, Result};

use super::cache::{Cache, asset};
use testkit::kubernetes::images;

/// What a container of it runs that is an OAP; options of the JVM come before.
pub const OAP: [&str; 2] = [
    "@/opt/oap/class-path",
    "org.apache.skywalking.oap.server.starter.OAPServerStartUp",
];
/// What a container runs that is the application with the agent; options of the JVM and properties
/// of the agent come before.
pub const APPLICATION: [&str; 4] = [
    "-javaagent:/opt/agent/skywalking-agent.jar",
    "-cp",
    "/opt/agent/application",
    "balancer.e2e.IdleApp",
];
/// The JVM.
pub const JAVA: &str = "/opt/java/bin/java";

/// Writes the archive of an image of this name: a JRE, the OAP, and the application with its agent.
///
/// # Errors
/// When the cache was damaged, or a file can't be read or written.
pub fn write(cache: &Cache, name: &str, to: &Path) -> Result<()> {
    let jre = cache.jre();
    let mut root = images::shell()?;
    root.copy_tree("opt/java", &jre)?;
    root.copy_tree("opt/agent", &cache.java())?;
    root.copy_tree("opt/oap/conf", &asset("conf"))?;
    for part in ["bin/java", "lib/server/libjvm.so", "lib/libzip.so"] {
        root.libraries_outside(&jre, &jre.join(part))?;
    }
    let mut class_path = "/opt/oap/conf".to_owned();
    for jar in cache.oap_jars()? {
        let name = jar.file_name().context("a jar has a name")?;
        let inside = format!("opt/oap/lib/{}", name.to_string_lossy());
        root.copy(&inside, &jar)?;
        class_path.push_str(":/");
        class_path.push_str(&inside);
    }
    // java reads options from such a file (@argfile).
    root.file("opt/oap/class-path", 0o644, format!("-cp {class_path}\n"));
    images::write(name, root, &[], to)
}
