//! Who is who in a cluster: certificates, the keys of service accounts, and tokens of the programs.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use serde_json::json;

/// Users with a token of their own, and their groups.
const USERS: [(&str, &str); 7] = [
    (ADMIN, "system:masters"),
    ("system:kube-controller-manager", ""),
    ("system:kube-scheduler", ""),
    ("system:kube-proxy", "system:node-proxier"),
    ("system:node:node1", "system:nodes"),
    ("system:node:node2", "system:nodes"),
    ("system:node:node3", "system:nodes"),
];

/// Who may do everything.
pub(super) const ADMIN: &str = "admin";

/// A directory with all of it.
pub(super) struct Pki {
    directory: PathBuf,
}

impl Pki {
    /// Makes a certificate authority, and what the API server needs that answers at `addresses`.
    ///
    /// # Panics
    /// When the directory can't be written.
    pub(super) fn make(directory: &Path, addresses: &[IpAddr]) -> Self {
        fs::create_dir(directory).expect("a directory can be made");
        let pki = Self {
            directory: directory.to_owned(),
        };
        let authority = pki.make_authority();
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
        ];
        let names = names.into_iter().map(str::to_owned);
        let names: Vec<_> = names
            .chain(addresses.iter().map(IpAddr::to_string))
            .collect();
        let mut server = CertificateParams::new(names).expect("these are names");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        pki.sign("apiserver", &server, &authority);
        let mut client = CertificateParams::default();
        let subject = &mut client.distinguished_name;
        subject.push(DnType::CommonName, "apiserver-kubelet-client");
        subject.push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        pki.sign("kubelet-client", &client, &authority);
        let accounts = key();
        pki.write("accounts.key", &accounts.serialize_pem());
        pki.write("accounts.pub", &accounts.public_key_pem());
        let mut tokens = String::new();
        for (user, groups) in USERS {
            writeln!(tokens, "{},{user},{user},\"{groups}\"", token(user))
                .expect("a string can be written");
        }
        pki.write("tokens.csv", &tokens);
        pki
    }

    /// One of its files.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A kubeconfig for one of the [`USERS`].
    pub(super) fn kubeconfig(&self, user: &str, server: &str) -> String {
        self.kubeconfig_with_token(&token(user), server)
    }

    /// A kubeconfig, complete in itself, for whoever this token makes known.
    pub(super) fn kubeconfig_with_token(&self, token: &str, server: &str) -> String {
        let authority = fs::read(self.file("ca.crt")).expect("the certificate is there");
        // JSON is YAML too.
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {
                "server": server,
                "certificate-authority-data": BASE64_STANDARD.encode(authority),
            }}],
            "users": [{"name": "test", "user": {"token": token}}],
        })
        .to_string()
    }

    fn make_authority(&self) -> Issuer<'static, KeyPair> {
        let mut authority = CertificateParams::default();
        let subject = &mut authority.distinguished_name;
        subject.push(DnType::CommonName, "test-authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
        ];
        let key = key();
        let certificate = authority
            .self_signed(&key)
            .expect("a certificate can be made");
        self.write("ca.crt", &certificate.pem());
        Issuer::new(authority, key)
    }

    fn sign(&self, name: &str, what: &CertificateParams, authority: &Issuer<'_, KeyPair>) {
        let key = key();
        let certificate = what
            .signed_by(&key, authority)
            .expect("a certificate can be signed");
        self.write(&format!("{name}.crt"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), text).expect("the directory can be written");
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key can be made")
}

/// No secret: who can reach the API server of a test is inside its namespace.
fn token(user: &str) -> String {
    format!("token-of-{user}")
}
