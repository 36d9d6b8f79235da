//! The Kubernetes that other tests rely on.

use std::time::Duration;

use anyhow::ensure;
use balancer_tests::fixtures::{Machine, eventually};
use balancer_tests::kubernetes::ApiServer;
use balancer_tests::kubernetes::objects::{self, Endpoint};

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
        admin.patch_status(
            "pod",
            "skywalking",
            "oap-0",
            &serde_json::json!({"phase": "Failed"}),
        );
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
            &["create", "namespace", "shop"],
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
        api.admin().apply(&objects::namespace("shop"));
        api.stop();
        let refused = api.admin().attempt(&["get", "namespace", "shop"]);
        assert!(refused.stderr.contains("refused"), "{refused:?}");
        api.start_again();
        api.kubectl(&["get", "namespace", "shop"]);
        api.freeze();
        let unanswered =
            api.admin()
                .attempt(&["get", "namespace", "shop", "--request-timeout=300ms"]);
        assert_ne!(unanswered.code, 0, "{unanswered:?}");
        api.thaw();
        api.kubectl(&["get", "namespace", "shop"]);
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
        service["spec"]["selector"] = serde_json::json!({"app": "oap"});
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
