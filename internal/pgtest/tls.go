package pgtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// PrivateTLS is [Private] with TLS: the server's certificate is made for t and signed by itself, and the server's DSN has
// sslmode=verify-full and trusts that certificate alone. The server still takes connections without TLS.
func PrivateTLS(t testing.TB) *Server {
	t.Helper()
	server := Private(t)
	dsn, err := withTLS(server.dsn, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server.dsn = dsn
	return server
}

// withTLS turns TLS on at the server of dsn and returns the DSN to reach it so. The certificate is put in dir.
func withTLS(dsn, dir string) (string, error) {
	u, err := url.Parse(dsn)
	if err != nil {
		return "", err
	}
	cert, key, err := selfSigned(u.Hostname())
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), databaseTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	// By the server itself: it wants to own its key, and it may be in a container.
	for _, statement := range []string{
		copyToFile("server.crt", cert),
		copyToFile("server.key", key),
		"alter system set ssl = on",
		"select pg_reload_conf()",
	} {
		if _, err := conn.Exec(ctx, statement, pgx.QueryExecModeSimpleProtocol); err != nil {
			return "", fmt.Errorf("pgtest: turn TLS on: %w", err)
		}
	}

	root := filepath.Join(dir, "root.crt")
	if err := os.WriteFile(root, cert, 0o600); err != nil {
		return "", err
	}
	query := u.Query()
	query.Set("sslmode", "verify-full")
	query.Set("sslrootcert", root)
	u.RawQuery = query.Encode()
	// pg_reload_conf does not wait for the postmaster to have taken it up.
	if err := connectUntil(ctx, u.String()); err != nil {
		return "", fmt.Errorf("pgtest: turn TLS on: %w", err)
	}
	return u.String(), nil
}

// copyToFile returns the statement that has the server write text, which is lines of PEM, to a file in its data folder.
func copyToFile(name string, text []byte) string {
	return fmt.Sprintf("copy (select regexp_split_to_table('%s', '\n')) to program 'umask 077; cat >%s'", text, name)
}

// selfSigned makes a certificate for a host name or address, and its key.
func selfSigned(host string) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}
