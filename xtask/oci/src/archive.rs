//! An OCI image layout in a tar file, with one image of one layer. It has the `manifest.json` of
//! `docker save` too, which older engines look for.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tar::{Builder, EntryType};

use crate::digest;
use crate::layer::{Layer, append};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an image says of itself.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// The image's name once it is loaded, with a tag: `localhost/web:1`.
    pub name: String,
    /// What a container runs that is not told otherwise.
    pub entrypoint: Vec<String>,
    /// Annotations of the manifest, which are labels of the configuration too.
    pub annotations: BTreeMap<String, String>,
    /// What made it.
    pub created_by: String,
}

impl Image {
    /// Writes the archive.
    ///
    /// # Errors
    /// When it can't be written, or OCI has no name for this machine's architecture.
    pub fn write(&self, layer: Layer, to: impl Write) -> Result<()> {
        let platform = json!({"architecture": architecture()?, "os": "linux"});
        let mut blobs = Blobs::default();
        let config = json!({
            "architecture": platform["architecture"],
            "os": platform["os"],
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": [PATH],
                "WorkingDir": "/",
                "Labels": self.annotations,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": self.created_by}],
        });
        let config = blobs.add_json(CONFIG, &config);
        let layer = blobs.add(layer.media_type(), layer.content);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer],
            "annotations": self.annotations,
        });
        let mut manifest = blobs.add_json(MANIFEST, &manifest);
        let tag = self.name.rsplit(':').next().unwrap_or_default();
        manifest["platform"] = platform;
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]});
        let for_docker = json!([{
            "Config": path(&config),
            "RepoTags": [self.name],
            "Layers": [path(&layer)],
        }]);

        let mut tar = Builder::new(to);
        let mut file =
            |path: &str, content: &[u8]| append(&mut tar, path, EntryType::Regular, 0o644, content);
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        file("index.json", index.to_string().as_bytes())?;
        file("manifest.json", for_docker.to_string().as_bytes())?;
        for (path, blob) in &blobs.0 {
            file(path, blob)?;
        }
        tar.finish().context("cannot write the image")
    }
}

/// By path in the archive.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let descriptor =
            json!({"mediaType": media_type, "digest": digest(&content), "size": content.len()});
        self.0.insert(path(&descriptor), content);
        descriptor
    }

    fn add_json(&mut self, media_type: &str, content: &Value) -> Value {
        self.add(media_type, content.to_string().into_bytes())
    }
}

/// Where the blob of a descriptor is.
fn path(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    format!("blobs/{}", digest.replace(':', "/"))
}

/// This machine's architecture by the name that Go, and so OCI, has for it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        "riscv64" => Ok("riscv64"),
        other => bail!("no image for {other}: it has not been tried there"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use serde_json::Value;

    use super::Image;
    use crate::{Layer, Root, digest};

    fn archive(revision: &str) -> Vec<u8> {
        let mut root = Root::default();
        root.file("usr/share/doc/x", 0o644, "x");
        root.file("bin/y", 0o755, "y");
        root.link("bin/z", "y");
        let annotations = [("org.opencontainers.image.revision", revision)];
        let image = Image {
            name: "localhost/x:1".to_owned(),
            entrypoint: vec!["/bin/y".to_owned()],
            annotations: annotations
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            created_by: "a test".to_owned(),
        };
        let mut archive = Vec::new();
        image
            .write(Layer::compressed(root).unwrap(), &mut archive)
            .unwrap();
        archive
    }

    #[test]
    fn the_same_files_give_the_same_archive() {
        assert!(
            archive("c0ffee") == archive("c0ffee"),
            "two archives of the same files differ"
        );
    }

    #[test]
    fn everything_in_an_archive_is_found_by_its_digest() {
        let files = files(&archive("c0ffee"));
        let blob = |descriptor: &Value| {
            let named = descriptor["digest"].as_str().unwrap();
            let content = &files[&format!("blobs/{}", named.replace(':', "/"))];
            assert_eq!(digest(content), named);
            assert_eq!(descriptor["size"], content.len());
            content.clone()
        };
        let json = |content: &[u8]| serde_json::from_slice::<Value>(content).unwrap();

        let index = json(&files["index.json"]);
        let manifest = json(&blob(&index["manifests"][0]));
        let config = json(&blob(&manifest["config"]));
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&*blob(&manifest["layers"][0]))
            .read_to_end(&mut plain)
            .unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&plain));
        assert_eq!(config["config"]["Entrypoint"][0], "/bin/y");
        assert_eq!(
            manifest["annotations"]["org.opencontainers.image.revision"],
            "c0ffee"
        );
        let named = &index["manifests"][0]["annotations"];
        assert_eq!(named["io.containerd.image.name"], "localhost/x:1");
        assert_eq!(named["org.opencontainers.image.ref.name"], "1");

        let docker = json(&files["manifest.json"]);
        for path in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
            assert!(
                files.contains_key(path.as_str().unwrap()),
                "{path} is missing"
            );
        }
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }
}
