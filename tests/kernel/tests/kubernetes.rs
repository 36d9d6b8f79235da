//! The Kubernetes that other tests rely on.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::fixtures::{Machine, eventually};
use testkit::kubernetes::images::{self, BUSYBOX, TOOLS};
use testkit::kubernetes::objects::{self, Endpoint};
use testkit::kubernetes::{ApiServer, Cluster};

#[test]
fn objects_are_read_back_as_they_were_written() {
    Machine::with(|machine| {
        let api = ApiServer::start(&machine.netns);
        let admin = api.admin();
        admin.apply(&objects::list(&[
            objects::namespace("skywalking"),
            objects::node("node1"),
            objects::labelled(
                objects::pod("skywalking", "oap-0", "node1", &["10.244.1.5"]),
                &[("component", "oap")],
            ),
            objects::service("skywalking", "oap", &[("grpc", 11800)]),
            objects::endpoint_slice(
                "skywalking",
                "oap-1",
                "oap",
                &[("grpc", 11800)],
                &[
                    Endpoint::new("10.244.1.5", "oap-0", "node1"),
                    Endpoint::new("10.244.1.6", "oap-1", "node1").terminating(),
                ],
            ),
        ]));
        let pods = admin.get(&["pods", "-n", "skywalking", "-l", "component=oap"]);
        let pod = &pods["items"][0];
        assert_eq!(pod["status"]["podIP"], "10.244.1.5", "{pods}");
        assert_eq!(pod["status"]["phase"], "Running", "{pods}");
        let slice = admin.get(&["endpointslices", "oap-1", "-n", "skywalking"]);
        assert_eq!(slice["endpoints"][0]["conditions"]["ready"], true);
        assert_eq!(slice["endpoints"][1]["conditions"]["terminating"], true);
        let node = admin.get(&["node", "node1"]);
        assert_eq!(node["status"]["conditions"][0]["status"], "True", "{node}");
        admin.patch_status("pod", "skywalking", "oap-0", &json!({"phase": "Failed"}));
        let pod = admin.get(&["pod", "oap-0", "-n", "skywalking"]);
        assert_eq!(pod["status"]["phase"], "Failed", "{pod}");
    });
}

#[test]
fn a_service_account_may_do_what_its_role_says_and_nothing_else() {
    Machine::with(|machine| {
        let api = ApiServer::start(&machine.netns);
        api.admin()
            .apply(&objects::service_account("default", "watcher"));
        api.admin().apply(&objects::cluster_role(
            "watcher",
            ("default", "watcher"),
            &[("", "pods", &["list", "watch"])],
        ));
        let watcher = api.account("default", "watcher");
        watcher.run(&["get", "pods", "--all-namespaces"]);
        for forbidden in [
            &["get", "secrets"][..],
            &["create", "namespace", "workloads"],
            &["delete", "pod", "oap-0"],
        ] {
            let refused = watcher.attempt(forbidden);
            assert_ne!(refused.code, 0, "{forbidden:?}");
            assert!(refused.stderr.contains("Forbidden"), "{refused:?}");
        }
    });
}

#[test]
fn what_an_api_server_has_stored_outlives_it() {
    Machine::with(|machine| {
        let mut api = ApiServer::start(&machine.netns);
        api.admin().apply(&objects::namespace("workloads"));
        api.stop();
        let refused = api.admin().attempt(&["get", "namespace", "workloads"]);
        assert!(refused.stderr.contains("refused"), "{refused:?}");
        api.start_again();
        api.kubectl(&["get", "namespace", "workloads"]);
        api.freeze();
        let unanswered =
            api.admin()
                .attempt(&["get", "namespace", "workloads", "--request-timeout=300ms"]);
        assert_ne!(unanswered.code, 0, "{unanswered:?}");
        api.thaw();
        api.kubectl(&["get", "namespace", "workloads"]);
    });
}

#[test]
fn controllers_write_what_follows_from_what_a_test_writes() {
    Machine::with(|machine| {
        let api = ApiServer::start_with_controllers(&machine.netns);
        let admin = api.admin();
        // Only then pods are let in.
        eventually(Duration::from_secs(30), || {
            let account = admin.attempt(&["get", "serviceaccount", "default"]);
            ensure!(account.code == 0, "{account:?}");
            Ok(())
        });
        let mut service = objects::service("default", "oap", &[("grpc", 11800)]);
        service["spec"]["selector"] = json!({"app": "oap"});
        admin.apply(&objects::list(&[
            objects::node("node1"),
            objects::labelled(
                objects::pod("default", "oap-0", "node1", &["10.244.1.5"]),
                &[("app", "oap")],
            ),
            service,
        ]));
        eventually(Duration::from_secs(30), || {
            let slices = admin.get(&["endpointslices", "-l", "kubernetes.io/service-name=oap"]);
            let endpoint = &slices["items"][0]["endpoints"][0];
            ensure!(endpoint["addresses"][0] == "10.244.1.5", "{slices}");
            ensure!(endpoint["conditions"]["ready"] == true, "{slices}");
            Ok(())
        });
    });
}

#[test]
fn a_cluster_runs_pods_that_are_reached_through_their_service() {
    let cluster = Cluster::start(2, &[]);
    let admin = cluster.admin();
    let mut service = objects::service("default", "web", &[("http", 80)]);
    service["spec"]["selector"] = json!({"app": "web"});
    service["spec"]["ports"][0]["targetPort"] = json!(8080);
    admin.apply(&objects::list(&[web(2), service]));
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    let service = admin.get(&["service", "web"]);
    let address = service["spec"]["clusterIP"].as_str().expect("an address");
    let address = format!("{address}:80");
    // Readiness reaches the nodes' rules a moment later.
    eventually(Duration::from_secs(30), || {
        let answers = (0..20).map(|_| cluster.outside().run(|| fetch(&address)));
        let names: BTreeSet<_> = answers.collect::<anyhow::Result<_>>()?;
        ensure!(names.len() == 2, "not both pods answer: {names:?}");
        Ok(())
    });
    // The API server, as pods find it: it does not speak HTTP without TLS there, and says so.
    let ask = "wget -S -O - http://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT";
    let exec = ["exec", "deployment/web", "--", "sh", "-c", ask];
    let answer = admin.attempt(&exec).stderr;
    assert!(answer.contains("400 Bad Request"), "{answer}");
}

#[test]
fn an_image_that_a_test_makes_runs_on_the_node_that_has_it() {
    let cluster = Cluster::start(1, &[]);
    let directory = tempfile::tempdir().expect("a directory can be made");
    let archive = directory.path().join("tools.tar");
    images::write_tools(&archive).expect("the image can be written");
    cluster.import_image("node1", &archive);
    cluster.admin().apply(&pod("oap", TOOLS, &["standin-oap"]));
    cluster.kubectl(&["wait", "pod/oap", "--for=condition=Ready", "--timeout=120s"]);
    let pod = cluster.admin().get(&["pod", "oap"]);
    let address = pod["status"]["podIP"].as_str().expect("an address");
    let address: SocketAddr = format!("{address}:11800").parse().expect("an address");
    eventually(Duration::from_secs(10), || {
        cluster.outside().run(|| TcpStream::connect(address))?;
        Ok(())
    });
}

#[test]
fn what_a_privileged_pod_mounts_shows_on_its_node_and_no_further() {
    let mut cluster = Cluster::start(2, &[]);
    cluster.admin().apply(&mounter("node2"));
    cluster.kubectl(&[
        "wait",
        "pod/mounter",
        "--for=condition=Ready",
        "--timeout=120s",
    ]);
    let seen = cluster.enter("node2", &["ls", "/sys/fs/bpf/below"]);
    assert_eq!(seen.stdout.trim(), "seen", "{seen:?}");
    assert_ne!(cluster.enter("node1", &["ls", "/sys/fs/bpf/below"]).code, 0);
    assert!(!std::path::Path::new("/sys/fs/bpf/below").exists());
    let inside = cluster.kubectl(&["exec", "mounter", "--", "hostname"]);
    assert_eq!(inside.trim(), "node2", "it uses the node's own names");
    cluster.kill_node("node2");
    let gone = "--for=condition=Ready=Unknown";
    cluster.kubectl(&["wait", "node/node2", gone, "--timeout=60s"]);
    cluster.start_node("node2");
}

/// A Deployment of web servers that tell their name.
fn web(replicas: u32) -> Value {
    let serve = "mkdir /tmp/web; hostname > /tmp/web/index.html; exec httpd -f -p 8080 -h /tmp/web";
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "web",
                        "image": BUSYBOX,
                        "imagePullPolicy": "Never",
                        "command": ["sh", "-c", serve],
                        "readinessProbe": {
                            "httpGet": {"path": "/", "port": 8080},
                            "periodSeconds": 1,
                        },
                    }],
                },
            },
        },
    })
}

/// A pod with one container.
fn pod(name: &str, image: &str, command: &[&str]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main",
                "image": image,
                "imagePullPolicy": "Never",
                "command": command,
            }],
        },
    })
}

/// A pod like the balancer's: in the netns and pid namespace of the node, with its bpffs, in which
/// it mounts something.
fn mounter(node: &str) -> Value {
    let mount = "mkdir -p /sys/fs/bpf/below; mount -t tmpfs none /sys/fs/bpf/below; touch /sys/fs/bpf/below/seen; exec sleep 1000";
    let mut pod = pod("mounter", BUSYBOX, &["sh", "-c", mount]);
    let spec = &mut pod["spec"];
    spec["nodeName"] = json!(node);
    spec["hostNetwork"] = json!(true);
    spec["hostPID"] = json!(true);
    spec["volumes"] = json!([{
        "name": "bpffs",
        "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"},
    }]);
    let container = &mut spec["containers"][0];
    container["securityContext"] = json!({"privileged": true});
    container["volumeMounts"] = json!([{
        "name": "bpffs",
        "mountPath": "/sys/fs/bpf",
        "mountPropagation": "Bidirectional",
    }]);
    container["readinessProbe"] = json!({
        "exec": {"command": ["test", "-e", "/sys/fs/bpf/below/seen"]},
        "periodSeconds": 1,
    });
    pod
}

/// What a web server answers, without its headers.
fn fetch(address: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| anyhow::anyhow!("no answer: {answer:?}"))?;
    Ok(body.trim().to_owned())
}
